"""Attention by plain matrix products, one autograd function over many segments.

Work is cut into tiles: rows of one segment, or of several short neighbours, with the keys they may see.
Small tiles of one shape are computed together. A segment may continue a prefix, a stretch of tokens elsewhere
in the batch: its rows see the prefix's keys too, and every continuation adds its part to the prefix's
gradient. Knows nothing of models.

# H query heads, K key heads, g = H / K, T tokens of the batch; R rows and M keys of a tile, S tiles
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

# Rows of one tile at most: keys after a tile's last row are never multiplied.
TILE_ROWS = 256
# Neighbours are one tile up to so many tokens together: a tile more costs more than products in vain.
JOINED_TOKENS = 64
# Pairs of rows and keys computed together, unless one tile has more: what is held of each head at once.
STACKED_PAIRS = 1 << 16
# Rows and keys of a tile are filled up to a multiple: odd shapes are slow, and new ones have to be prepared.
TILE_MULTIPLE = 32
# Masks up to this size are kept: every layer needs the same ones, and long segments' would fill the memory.
KEPT_PAIRS = 1 << 18


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the batch, and the stretch it continues (of no tokens where it continues none).

    A token's position counts the prefix: the segment's own tokens are from `prefix_length` to `end`.
    """

    start: int
    length: int
    prefix_start: int
    prefix_length: int

    @property
    def end(self) -> int:
        return self.prefix_length + self.length


@functools.lru_cache(maxsize=8)  # every layer of a model asks for the same batch
def placed(lengths: tuple[int, ...], prefixes: tuple[int | None, ...] = ()) -> tuple[Segment, ...]:
    """The segments of a batch, from their lengths and the number of the segment that each continues."""
    starts = [0, *itertools.accumulate(lengths)]
    found = []
    for number, length in enumerate(lengths):
        prefix = prefixes[number] if prefixes else None
        found.append(
            Segment(starts[number], length, 0, 0)
            if prefix is None
            else Segment(starts[number], length, starts[prefix], lengths[prefix])
        )
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is computed, and how: `segments` may be a part of the batch."""

    segments: tuple[Segment, ...]
    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """Rows of a segment, or of neighbours that have these `lengths`, and the keys they may see.

    Rows from `row` to `end` and keys from `key` to `end` count from `start`, where the segments begin.
    """

    start: int
    lengths: tuple[int, ...]
    prefix_start: int
    prefix_length: int
    row: int
    key: int
    end: int

    @property
    def rows(self) -> slice:
        """The rows' places in the batch."""
        return slice(self.start + self.row, self.start + self.end)

    @property
    def keys(self) -> slice:
        """The places of their own keys: those before them and their own."""
        return slice(self.start + self.key, self.start + self.end)

    @property
    def prefix(self) -> slice:
        """The places of the prefix's keys."""
        return slice(self.prefix_start, self.prefix_start + self.prefix_length)

    @property
    def has_all_keys(self) -> bool:
        """Of its segments; then it may write their gradients, else it adds to them."""
        return self.key == 0 and self.end == sum(self.lengths)

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, R, and how many of the keys are a prefix's."""
        own = _up(_size(self.keys))
        return own + _up(self.prefix_length), _up(_size(self.rows)), self.prefix_length

    def own(self, x_KMD: Tensor) -> Tensor:
        """The own keys' part of such a tensor."""
        return x_KMD[:, : _size(self.keys)]

    def of_prefix(self, x_KMD: Tensor) -> Tensor:
        """The prefix's part of such a tensor."""
        start = _up(_size(self.keys))
        return x_KMD[:, start : start + _size(self.prefix)]


def _size(places: slice) -> int:
    return int(places.stop - places.start)


def _up(number: int) -> int:
    return -(-number // TILE_MULTIPLE) * TILE_MULTIPLE


def _filled(x_HLD: Tensor) -> Tensor:
    """With zeros after the last row, up to a multiple."""
    return pad(x_HLD, (0, 0, 0, -x_HLD.shape[1] % TILE_MULTIPLE))


_Stack = tuple[_Tile, ...]  # tiles of one shape


def _rows_of(stack: _Stack, x_HTD: Tensor) -> Tensor:
    """(H, T, D) as (S, H, R, D), filled up with zeros."""
    return torch.stack([_filled(x_HTD[:, tile.rows]) for tile in stack])


def _keys_of(stack: _Stack, x_KTD: Tensor) -> Tensor:
    """(K, T, D) as (S, K, M, D): own keys, then the prefix's, each filled up with zeros."""
    own_SKMD = torch.stack([_filled(x_KTD[:, tile.keys]) for tile in stack])
    if not stack[0].prefix_length:
        return own_SKMD
    return torch.cat([own_SKMD, torch.stack([_filled(x_KTD[:, tile.prefix]) for tile in stack])], dim=2)


@functools.lru_cache(maxsize=8)  # every layer of a model asks for the same batch
def _stacks(segments: tuple[Segment, ...], window: int | None) -> tuple[_Stack, ...]:
    """All tiles, those of one shape together; of a segment's tiles one with all its keys comes first."""
    stacks = []
    # A tile with all keys of its segment has more than the segment's others.
    tiles = sorted(_tiles(segments, window), key=lambda tile: tile.shape, reverse=True)
    for (num_keys, num_rows, _), alike in itertools.groupby(tiles, key=lambda tile: tile.shape):
        size = max(1, STACKED_PAIRS // (num_keys * num_rows))
        found = tuple(alike)
        stacks += [found[start : start + size] for start in range(0, len(found), size)]
    return tuple(stacks)


def _tiles(segments: tuple[Segment, ...], window: int | None) -> list[_Tile]:
    found = []
    for joined in _neighbours(segments):
        lengths = tuple(segment.length for segment in joined)
        length = sum(lengths)
        num_rows = _up(-(-length // -(-length // TILE_ROWS)))
        for row in range(0, length, num_rows):
            key = 0 if window is None else max(0, row - window + 1)
            end = min(row + num_rows, length)
            found.append(
                _Tile(
                    start=joined[0].start,
                    lengths=lengths,
                    prefix_start=joined[0].prefix_start,
                    prefix_length=joined[0].prefix_length,
                    row=row,
                    key=key,
                    end=end,
                )
            )
    return found


def _neighbours(segments: tuple[Segment, ...]) -> Iterator[list[Segment]]:
    """Segments that follow each other and continue the same prefix, together while they are short."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and not _goes_on(joined, segment):
            yield joined
            joined = []
        joined.append(segment)
    if joined:
        yield joined


def _goes_on(joined: list[Segment], segment: Segment) -> bool:
    before, end = joined[-1], segment.start + segment.length
    return (
        segment.start == before.start + before.length
        and (segment.prefix_start, segment.prefix_length) == (before.prefix_start, before.prefix_length)
        and end - joined[0].start <= JOINED_TOKENS
    )


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
        for stack in _stacks(shape.segments, shape.window):
            q_SHRD, k_SKMD = _rows_of(stack, q_HTD) * shape.scale, _keys_of(stack, k_KTD)
            p_SKNM, _ = _probabilities(q_SHRD, k_SKMD, stack, shape)
            out_SHRD = (p_SKNM @ _keys_of(stack, v_KTD)).view(len(stack), heads, -1, size)
            for tile, out_HRD in zip(stack, out_SHRD, strict=True):
                out_THD[tile.rows] = out_HRD[:, : _size(tile.rows)].transpose(0, 1)
        ctx.save_for_backward(q_HTD, k_KTD, v_KTD)
        ctx.shape, ctx.covers_all = shape, covers_all
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_THD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_HTD, k_KTD, v_KTD = ctx.saved_tensors
        shape: Shape = ctx.shape
        stacks = _stacks(shape.segments, shape.window)
        num_written = sum(_size(tile.keys) for stack in stacks for tile in stack if tile.has_all_keys)
        formed = torch.empty_like if num_written == q_HTD.shape[1] else torch.zeros_like
        dq_HTD, dk_KTD, dv_KTD = formed(q_HTD), formed(k_KTD), formed(v_KTD)
        of_prefixes = _PrefixGradients()
        for stack in stacks:
            q_SHRD = _rows_of(stack, q_HTD) * shape.scale
            k_SKMD, v_SKMD = _keys_of(stack, k_KTD), _keys_of(stack, v_KTD)
            p_SKNM, slope = _probabilities(q_SHRD, k_SKMD, stack, shape)
            q_SKND = q_SHRD.view(*p_SKNM.shape[:3], -1)
            # Rows that fill up have a gradient of zero, so that what they see does not matter.
            d_out_SKND = _rows_of(stack, d_out_THD.transpose(0, 1)).view(q_SKND.shape)
            dp_SKNM = d_out_SKND @ v_SKMD.transpose(-1, -2)
            ds_SKNM = torch._softmax_backward_data(dp_SKNM, p_SKNM, -1, p_SKNM.dtype)
            if slope is not None:
                ds_SKNM *= slope
            dq_SHRD = (ds_SKNM @ k_SKMD).view(q_SHRD.shape)
            dk_SKMD, dv_SKMD = ds_SKNM.transpose(-1, -2) @ q_SKND, p_SKNM.transpose(-1, -2) @ d_out_SKND
            for tile, dq_HRD, dk_KMD, dv_KMD in zip(stack, dq_SHRD, dk_SKMD, dv_SKMD, strict=True):
                torch.mul(dq_HRD[:, : _size(tile.rows)], shape.scale, out=dq_HTD[:, tile.rows])
                for gradient_KTD, part_KMD in ((dk_KTD, dk_KMD), (dv_KTD, dv_KMD)):
                    if tile.has_all_keys:
                        gradient_KTD[:, tile.keys] = tile.own(part_KMD)
                    else:
                        gradient_KTD[:, tile.keys] += tile.own(part_KMD)
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
        if not _size(prefix):
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
    q_SHRD: Tensor, k_SKMD: Tensor, stack: _Stack, shape: Shape
) -> tuple[Tensor, Tensor | None]:
    """Attention of scaled rows over their keys, and the slope of a soft cap, (S, K, N = g R, M): the rows of
    a key head's queries one below the other, so that one product serves them all."""
    (num_tiles, kv_heads, num_keys, size), num_rows = k_SKMD.shape, q_SHRD.shape[2]
    scores_SKNM = q_SHRD.view(num_tiles, kv_heads, -1, size) @ k_SKMD.transpose(-1, -2)
    slope = None
    if shape.softcap is not None:
        squashed = torch.tanh(scores_SKNM / shape.softcap)
        scores_SKNM, slope = squashed * shape.softcap, 1 - squashed**2
    is_small = num_tiles * num_rows * num_keys <= KEPT_PAIRS
    bias_SRM = (_kept_biases if is_small else _biases)(stack, shape.window, q_SHRD.dtype, q_SHRD.device)
    scores_SKNM.view(num_tiles, kv_heads, -1, num_rows, num_keys).add_(bias_SRM[:, None, None])
    return torch.softmax(scores_SKNM, dim=-1), slope


def _biases(stack: _Stack, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.stack([_bias(tile, window, dtype, device) for tile in stack])


_kept_biases = functools.lru_cache(maxsize=128)(_biases)


def _bias(tile: _Tile, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to a tile's scores, (R, M): 0 where a row sees a key, else minus infinity.

    Rows that fill up see everything: without any key they would have no probabilities.
    """
    rows = torch.arange(tile.row, tile.end, device=device)[:, None]
    keys = torch.arange(tile.key, tile.end, device=device)[None]
    ends = torch.tensor(tile.lengths, device=device).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])[torch.searchsorted(ends, rows, right=True)]
    is_hidden = (keys > rows) | (keys < starts)
    if window is not None:
        is_hidden |= keys <= rows - window
    num_rows, num_keys, num_prefix = len(rows), keys.shape[1], _size(tile.prefix)
    prefix = slice(_up(num_keys), _up(num_keys) + num_prefix)
    bias_RM = torch.zeros(_up(num_rows), prefix.start + _up(num_prefix), dtype=dtype, device=device)
    real = bias_RM[:num_rows]
    real[:, :num_keys].masked_fill_(is_hidden, -math.inf)
    real[:, num_keys : prefix.start] = -math.inf
    if window is not None:
        distances = rows - starts + num_prefix - torch.arange(num_prefix, device=device)
        real[:, prefix].masked_fill_(distances >= window, -math.inf)
    real[:, prefix.stop :] = -math.inf
    return bias_RM


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
