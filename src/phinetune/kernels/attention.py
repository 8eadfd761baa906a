"""Attention over families of segments in a CPU's tile registers (Intel AMX), as functions of tensors.

Knows nothing of models or of autograd.
# H query heads, K key heads, T tokens of the batch, D head size
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from phinetune.kernels.products import SCRATCH, tile_library


class _Heads(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
    )


class _Attention(ctypes.Structure):
    """What `attend` in attention.c takes."""

    _fields_ = (
        *((name, _Heads) for name in ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("sums", "segments", "families")),
        *((name, ctypes.c_int64) for name in ("num_families", "num_tokens", "num_heads", "group", "size")),
        *(("window", ctypes.c_int64), ("scale", ctypes.c_float), ("softcap", ctypes.c_float)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Families:
    """Segments by families: a prefix, last, with all that continue it, or a segment by itself.

    `segments_S4` holds start, length, and start and length of the prefix; family f begins with segment
    `families[f]`, and the last entry is S.
    """

    segments_S4: Tensor
    families: Tensor

    def made(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor like x that attention is to fill: with zeros where segments leave tokens out."""
        covers_all = int(self.segments_S4[:, 1].sum()) == x.shape[1]
        return x.new_empty(shape) if covers_all else x.new_zeros(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What attention computes: causal, within `window` where one is told."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def tile_attention_for(q_HTD: Tensor) -> TileAttention | None:
    """Attention in tiles, where this machine has them for such heads."""
    found = tile_library(q_HTD.dtype, q_HTD.device)
    return None if found is None else TileAttention(found)


@dataclass(frozen=True, slots=True)
class TileAttention:
    """Attention in tiles."""

    _library: ctypes.CDLL

    def forward(
        self, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, families: Families, options: Options
    ) -> tuple[Tensor, Tensor]:
        """What the heads read, (T, H, D), zero for rows of no segment; and of the sums of the exponentials of
        scores the binary logarithms, (H, T)."""
        num_heads, num_tokens, size = q_HTD.shape
        out_THD = families.made(q_HTD, (num_tokens, num_heads, size))
        sums_HT = torch.empty(num_heads, num_tokens)
        self._attend(families, options, sums_HT, q=q_HTD, k=k_KTD, v=v_KTD, out=out_THD.transpose(0, 1))
        return out_THD, sums_HT

    def backward(
        self,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        out_THD: Tensor,
        sums_HT: Tensor,
        d_out_THD: Tensor,
        families: Families,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v."""
        dq, dk, dv = (families.made(x, x.shape) for x in (q_HTD, k_KTD, v_KTD))
        out, d_out = out_THD.transpose(0, 1), d_out_THD.transpose(0, 1)
        tensors = {
            "q": q_HTD,
            "k": k_KTD,
            "v": v_KTD,
            "out": out,
            "d_out": d_out,
            "dq": dq,
            "dk": dk,
            "dv": dv,
        }
        self._attend(families, options, sums_HT, **tensors)
        return dq, dk, dv

    def _attend(self, families: Families, options: Options, sums_HT: Tensor, **heads: Tensor) -> None:
        q_HTD, k_KTD = heads["q"], heads["k"]
        for x in heads.values():
            assert x.dtype == torch.bfloat16
            assert x.stride(2) == 1
            assert x.shape[1:] == q_HTD.shape[1:]
        attention = _Attention(
            sums=sums_HT.data_ptr(),
            segments=families.segments_S4.data_ptr(),
            families=families.families.data_ptr(),
            num_families=len(families.families) - 1,
            num_tokens=q_HTD.shape[1],
            num_heads=len(k_KTD),
            group=len(q_HTD) // len(k_KTD),
            size=q_HTD.shape[2],
            window=options.window or 0,
            scale=options.scale,
            softcap=options.softcap or 0.0,
            **{name: _Heads(x.data_ptr(), x.stride(0), x.stride(1)) for name, x in heads.items()},
        )
        num_threads = torch.get_num_threads()
        scratch = SCRATCH.of(num_threads * self._library.attention_bytes(ctypes.byref(attention)))
        self._library.attend(ctypes.byref(attention), ctypes.c_void_p(scratch), num_threads)
