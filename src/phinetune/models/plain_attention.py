"""Attention by plain matrix products, one autograd function over many segments.

Work is cut into tiles; those of one shape are computed together. A segment may continue a prefix, and every
continuation adds its part to the prefix's gradient. Knows nothing of models.

# H query heads, K key heads, g = H / K, T tokens of the batch; R rows and M keys of a tile, S tiles
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.models.attention_stacks import KEPT_PAIRS, Stack, stacks_of
from phinetune.models.attention_tiles import Segment, num_places


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is computed, and how: `segments` may be a part of the batch."""

    segments: tuple[Segment, ...]
    scale: float
    window: int | None
    softcap: float | None


class PlainAttention(torch.autograd.Function):
    """Softmax attention by tiles; probabilities are formed again in the backward pass.

    One function for all segments: slicing under autograd would build a gradient of full size for
    every slice. Rows of no segment are zero.
    """

    @staticmethod
    def forward(ctx: Any, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, shape: Shape) -> Tensor:
        heads, tokens, size = q_HTD.shape
        covers_all = sum(segment.length for segment in shape.segments) == tokens
        out_THD = (q_HTD.new_empty if covers_all else q_HTD.new_zeros)(tokens, heads, size)
        for stack in stacks_of(shape.segments, shape.window):
            q_SHRD, k_SKMD = stack.rows_of(q_HTD, shape.scale), stack.keys_of(k_KTD)
            p_SKNM, _ = _probabilities(q_SHRD, k_SKMD, stack, shape)
            out_SHRD = (p_SKNM @ stack.keys_of(v_KTD)).view(q_SHRD.shape)
            stack.put_rows(out_SHRD, out_THD.transpose(0, 1))
        ctx.save_for_backward(q_HTD, k_KTD, v_KTD)
        ctx.shape = shape
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_THD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_HTD, k_KTD, v_KTD = ctx.saved_tensors
        shape: Shape = ctx.shape
        stacks = stacks_of(shape.segments, shape.window)
        tiles = [tile for stack in stacks for tile in stack.tiles]
        num_written = sum(num_places(tile.keys) for tile in tiles if tile.has_all_keys)
        formed = torch.empty_like if num_written == q_HTD.shape[1] else torch.zeros_like
        dq_HTD, dk_KTD, dv_KTD = formed(q_HTD), formed(k_KTD), formed(v_KTD)
        of_prefixes = _PrefixGradients()
        for stack in stacks:
            q_SHRD = stack.rows_of(q_HTD, shape.scale)
            k_SKMD, v_SKMD = stack.keys_of(k_KTD), stack.keys_of(v_KTD)
            p_SKNM, slope = _probabilities(q_SHRD, k_SKMD, stack, shape)
            q_SKND = q_SHRD.view(*p_SKNM.shape[:3], -1)
            # Rows that fill up have a gradient of zero, so that what they see does not matter.
            d_out_SKND = stack.rows_of(d_out_THD.transpose(0, 1)).view(q_SKND.shape)
            ds_SKNM = stack.softmax_back(d_out_SKND @ v_SKMD.transpose(-1, -2), p_SKNM)
            if slope is not None:
                ds_SKNM *= slope
            stack.put_rows((ds_SKNM @ k_SKMD).view(q_SHRD.shape), dq_HTD, shape.scale)
            dk_SKMD, dv_SKMD = ds_SKNM.transpose(-1, -2) @ q_SKND, p_SKNM.transpose(-1, -2) @ d_out_SKND
            stack.put_keys(dk_SKMD, dk_KTD)
            stack.put_keys(dv_SKMD, dv_KTD)
            for tile, dk_KMD, dv_KMD in zip(stack.tiles, dk_SKMD, dv_SKMD, strict=True):
                of_prefixes.add(tile.prefix, tile.of_prefix(dk_KMD), tile.of_prefix(dv_KMD))
        of_prefixes.put(dk_KTD, dv_KTD)
        return dq_HTD, dk_KTD, dv_KTD, None


class _PrefixGradients:
    """What the continuations of prefixes add to their keys' and values' gradients, summed in float32.

    Put in place at the end: a prefix's own rows are computed among the others and set theirs first.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def add(self, prefix: slice, dk_KPD: Tensor, dv_KPD: Tensor) -> None:
        """Add the gradients of one tile."""
        if not num_places(prefix):
            return
        before = self._sums.get((prefix.start, prefix.stop))
        parts = dk_KPD.float(), dv_KPD.float()
        self._sums[prefix.start, prefix.stop] = (
            parts if before is None else (before[0] + parts[0], before[1] + parts[1])
        )

    def put(self, dk_KTD: Tensor, dv_KTD: Tensor) -> None:
        for (start, stop), (dk_KPD, dv_KPD) in self._sums.items():
            dk_KTD[:, start:stop] += dk_KPD
            dv_KTD[:, start:stop] += dv_KPD


def _probabilities(
    q_SHRD: Tensor, k_SKMD: Tensor, stack: Stack, shape: Shape
) -> tuple[Tensor, Tensor | None]:
    """Attention of scaled rows over their keys, and the slope of a soft cap, (S, K, N = g R, M): the rows of
    a key head's queries one below the other, so that one product serves them all."""
    num_tiles, kv_heads, _, size = k_SKMD.shape
    scores_SKNM = q_SHRD.view(num_tiles, kv_heads, -1, size) @ k_SKMD.transpose(-1, -2)
    slope = None
    if shape.softcap is not None:
        squashed = torch.tanh(scores_SKNM / shape.softcap)
        scores_SKNM, slope = squashed * shape.softcap, 1 - squashed**2
    return stack.softmax(scores_SKNM), slope


def hidden(first_row: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """True where row (first_row..end) may not see key (0..end): later, or out of the window."""
    is_small = (end - first_row) * end <= KEPT_PAIRS
    return (_kept_hidden if is_small else _hidden)(first_row, end, window, device)


def _hidden(first_row: int, end: int, window: int | None, device: torch.device) -> Tensor:
    rows = torch.arange(first_row, end, device=device)[:, None]
    keys = torch.arange(0, end, device=device)[None]
    is_hidden = keys > rows
    return is_hidden if window is None else is_hidden | (keys <= rows - window)


_kept_hidden = functools.lru_cache(maxsize=256)(_hidden)
