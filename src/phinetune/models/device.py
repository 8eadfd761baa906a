"""Choose device and data type by looking, once, and say why.

Knows nothing of models.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass

import torch

from phinetune.base.errors import SettingsError
from phinetune.kernels.library import described

# On a CPU in bfloat16 oneDNN prepares code for every shape of a product and keeps the last 1,024, half a
# gigabyte for a small model. The last 64 serve a step as fast (100 steps and 200 answers: the same CPU time
# in 0.94 instead of 1.28 GB). Read at the first product; the user's own values stand.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Where to compute, in which type, and the reason, in words."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose(device: str = "auto", dtype: str = "auto") -> Compute:
    """Resolve `auto`. Raises `SettingsError` when the machine has not what was asked for."""
    chosen = _device(device)
    if chosen.type == "cpu":
        kind, reason = _on_cpu(dtype)
        return Compute(device=chosen, dtype=kind, reason=f"{reason}; {described(kind)}")
    if dtype != "auto":
        return Compute(device=chosen, dtype=getattr(torch, dtype), reason=f"{dtype}, as set")
    if chosen.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Compute(device=chosen, dtype=torch.bfloat16, reason="bfloat16: the GPU has it")
        return Compute(device=chosen, dtype=torch.float32, reason="float32: the GPU lacks bfloat16")
    return Compute(device=chosen, dtype=torch.float32, reason="float32 on MPS")


def _on_cpu(dtype: str) -> tuple[torch.dtype, str]:
    if dtype != "auto":
        return getattr(torch, dtype), f"{dtype}, as set"
    speedup = cpu_bfloat16_speedup()
    if speedup > 1.2:
        return torch.bfloat16, f"bfloat16: matrix products are {speedup:.1f} times as fast as float32 here"
    return torch.float32, f"float32: bfloat16 matrix products are only {speedup:.1f} times as fast here"


def _device(name: str) -> torch.device:
    mps_is_available = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps_is_available else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not mps_is_available):
        raise SettingsError(
            f"device '{name}' is not available",
            where="device",
            why="this PyTorch build or machine has none",
            do="write device: auto, or install a PyTorch build for it",
        )
    return torch.device(name)


@functools.cache
def cpu_bfloat16_speedup() -> float:
    """Time of a float32 matrix product over bfloat16's, best of three; about 20 ms, probed once."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.full((256, 768), 0.5, dtype=dtype)
        w = torch.full((2048, 768), 0.5, dtype=dtype)
        torch.nn.functional.linear(x, w)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.float32) / seconds(torch.bfloat16)
