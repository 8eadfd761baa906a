"""Attention in a CPU's tile registers as one autograd function over many segments.

Keeps what the heads read and one number a row for the backward pass, nothing of rows by keys.
Knows nothing of models.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels.attention import Families, Options, TileAttention, tile_attention_for
from phinetune.models.attention_tiles import Segment


class AmxAttention(torch.autograd.Function):
    """Causal attention of segments; rows of no segment are zero. # see plain_attention.py for letters"""

    @staticmethod
    def forward(
        ctx: Any,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        segments: tuple[Segment, ...],
        options: Options,
    ) -> Tensor:
        families = families_of(segments)
        out_THD, sums_HT = _attention(q_HTD).forward(q_HTD, k_KTD, v_KTD, families, options)
        ctx.save_for_backward(q_HTD, k_KTD, v_KTD, out_THD, sums_HT)
        ctx.families, ctx.options = families, options
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_HTD, k_KTD, v_KTD, out_THD, sums_HT = ctx.saved_tensors
        dq, dk, dv = _attention(q_HTD).backward(
            q_HTD, k_KTD, v_KTD, out_THD, sums_HT, d_out_THD, ctx.families, ctx.options
        )
        return dq, dk, dv, None, None


def _attention(q_HTD: Tensor) -> TileAttention:
    found = tile_attention_for(q_HTD)
    assert found is not None
    return found


@functools.lru_cache(maxsize=8)  # every layer of a model asks for the same batch
def families_of(segments: tuple[Segment, ...]) -> Families:
    """Segments that continue the same prefix together, and then the prefix; the longest families first."""

    def prefix(segment: Segment) -> tuple[int, int]:
        is_rest = segment.prefix_length > 0
        return (segment.prefix_start, segment.prefix_length) if is_rest else (segment.start, segment.length)

    ordered = sorted(segments, key=lambda segment: (prefix(segment), segment.prefix_length == 0))
    families = [list(family) for _, family in itertools.groupby(ordered, key=prefix)]
    families.sort(key=lambda family: -sum(segment.length * segment.end for segment in family))
    rows = [
        [segment.start, segment.length, segment.prefix_start, segment.prefix_length]
        for family in families
        for segment in family
    ]
    return Families(
        segments_S4=torch.tensor(rows, dtype=torch.int64).view(-1, 4),
        families=torch.tensor([0, *itertools.accumulate(len(family) for family in families)]),
    )
