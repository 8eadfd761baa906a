"""Other ways to begin than A random and B zero: from the base's own weight, or with a normal A.

    PiSSA (arXiv 2404.02948)   W = U S Vᵀ,  B₀ = U √(S/s),  A₀ = √(S/s) Vᵀ     of the `rank` largest S
    OLoRA (arXiv 2406.01775)   W = Q R,     B₀ = Q,          A₀ = R            of the first `rank`

Both train B and A from there over W - s · B₀ A₀. The base stays untouched here: the layer computes

    W x + s (B A - B₀ A₀) x  =  W x + s · [B - B₀, B₀] [A; A - A₀] x

which is a plain update of twice the rank. That is how it is saved, exactly; a fresh layer is the base bit
by bit, and what training changes is not rounded beside the large B₀ A₀. Knows nothing of names or files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.base.errors import SettingsError
from phinetune.lora.frozen import frozen_weight
from phinetune.lora.function import lora_linear
from phinetune.lora.layers import LoraLinear
from phinetune.lora.settings import STARTS, LoraSettings
from phinetune.lora.weights import Update


def layer_maker(settings: LoraSettings) -> Callable[..., LoraLinear]:
    """What makes a layer that starts as they say. Raises `SettingsError` for an unknown word."""
    start = settings.init_lora_weights
    if not re.fullmatch(STARTS, start):
        raise SettingsError(
            f"init_lora_weights cannot be '{start}'",
            where="init_lora_weights",
            do="choose from paper, gaussian, pissa, pissa_niter_4 (any number), olora",
        )
    if start == "gaussian":
        return GaussianLinear
    if not settings.starts_in_base:
        return LoraLinear

    def make(base: nn.Module, **options: Any) -> StartedLinear:
        return StartedLinear(base, start=start, **options)

    return make


class GaussianLinear(LoraLinear):
    """A `LoraLinear` whose A begins normal with a deviation of 1 / rank, as PEFT's `gaussian`."""

    def reset(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            drawn = torch.empty(self.lora_A.shape).normal_(std=1 / self.rank, generator=generator)
            self.lora_A.copy_(drawn)
            self.lora_B.zero_()


class StartedLinear(LoraLinear):
    """A `LoraLinear` that begins with a part of the base's weight, and learns how that part changes.

    >>> layer = StartedLinear(nn.Linear(4, 3), start="pissa", rank=2, scaling=1.0)
    >>> layer.reset(torch.Generator().manual_seed(0))
    >>> x = torch.ones(1, 4)
    >>> bool((layer(x) == layer.base(x)).all()), bool(layer.lora_B.any())
    (True, True)
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(
        self, base: nn.Module, *, start: str, rank: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base, rank=rank, scaling=scaling, dropout=dropout)
        self.start = start
        if rank > min(self.in_features, self.out_features):
            raise SettingsError(
                f"a layer {self.in_features} -> {self.out_features} has no {rank} directions to start from",
                where="init_lora_weights",
                why=f"{start} takes them from the layer's weight",
                do=f"write lora_r: {min(self.in_features, self.out_features)}, or less",
            )
        if type(self.weight_OI.data).__name__ == "DTensor":
            raise SettingsError(
                f"{start} needs whole weights, and --shard divides them",
                where="init_lora_weights",
                do="leave --shard out, or write init_lora_weights: paper",
            )
        self.register_buffer("start_A", torch.zeros_like(self.lora_A), persistent=False)
        self.register_buffer("start_B", torch.zeros_like(self.lora_B), persistent=False)

    def fixed(self) -> Iterator[tuple[str, Tensor]]:
        yield "start_A", self.start_A
        yield "start_B", self.start_B

    def reset(self, generator: torch.Generator) -> None:
        """A and B of the base's weight; only `pissa_niter_N` draws random numbers."""
        with torch.no_grad():
            weight_OI = self.weight_OI.float()
            if self.start == "olora":
                a_RI, b_OR = _first_of_qr(weight_OI, self.rank)
            else:
                a_RI, b_OR = _largest_of_svd(
                    weight_OI, self.rank, self.scaling, self.start, generator.initial_seed()
                )
            for weight, value in (
                (self.lora_A, a_RI),
                (self.start_A, a_RI),
                (self.lora_B, b_OR),
                (self.start_B, b_OR),
            ):
                weight.copy_(value)

    def num_copied(self, dtype: torch.dtype) -> int:
        return 2 * (self.lora_A.numel() + self.lora_B.numel())

    def _plain(self) -> tuple[Tensor, Tensor]:
        """A and B of the plain update of twice the rank."""
        a_RI = torch.cat([self.lora_A, self.lora_A - self.start_A])
        b_OR = torch.cat([self.lora_B - self.start_B, self.start_B], dim=1)
        return a_RI, b_OR

    def update(self) -> Update:
        a_RI, b_OR = (weight.detach().to("cpu") for weight in self._plain())
        return Update(a_RI=a_RI, b_OR=b_OR, scaling=self.scaling)

    def take(self, update: Update) -> None:
        raise AssertionError("the plain update of a file does not say where A and B began")

    def delta_OI(self) -> Tensor:
        return self.update().delta_OI()

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_enabled:
            return super().forward(x)
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        threshold = self.threshold if self.training else 0
        return lora_linear(x, frozen_weight(self.base), bias, *self._plain(), self.scaling, threshold)


def _first_of_qr(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight_OI)
    return r[:rank], q[:, :rank]


def _largest_of_svd(
    weight_OI: Tensor, rank: int, scaling: float, start: str, seed: int
) -> tuple[Tensor, Tensor]:
    if start == "pissa":
        u_OS, sizes_S, v_SI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        devices = [weight_OI.device] if weight_OI.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            niter = int(start.rpartition("_")[2])
            u_OS, sizes_S, v_IS = torch.svd_lowrank(weight_OI, rank, niter=niter)
        v_SI = v_IS.t()
    root_R = (sizes_S[:rank] / scaling).sqrt()
    return root_R[:, None] * v_SI[:rank], u_OS[:, :rank] * root_R
