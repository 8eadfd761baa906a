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

from phinetune.kernels.calls import Places, kernels_for

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


_Tiles = tuple[_Tile, ...]  # of one shape


@dataclass(frozen=True, slots=True, eq=False)
class _Stack:
    """Tiles of one shape, which are computed together: where their rows are, and what these see.

    `spans_SR4` holds the ends of the two stretches of keys that each row sees: own ones, and the prefix's.
    """

    tiles: _Tiles
    rows: Places
    keys: Places
    prefixes: Places
    spans_SR4: Tensor

    @classmethod
    def of(cls, tiles: _Tiles, window: int | None) -> _Stack:
        adds = [not tile.has_all_keys for tile in tiles]
        return cls(
            tiles=tiles,
            rows=_places([tile.rows for tile in tiles], [False] * len(tiles)),
            keys=_places([tile.keys for tile in tiles], adds),
            prefixes=_places([tile.prefix for tile in tiles], adds),
            spans_SR4=torch.stack([_spans(tile, window) for tile in tiles]),
        )

    @property
    def num_own(self) -> int:
        """The keys that are no prefix's, filled up."""
        return _up(_size(self.tiles[0].keys))

    def rows_of(self, x_HTD: Tensor, scale: float = 1.0) -> Tensor:
        """(H, T, D) as (S, H, R, D), scaled and filled up with zeros."""
        if kernels := kernels_for(x_HTD):
            x_SHRD = x_HTD.new_empty(len(self.tiles), len(x_HTD), self.spans_SR4.shape[1], x_HTD.shape[2])
            kernels.gather(x_HTD, self.rows, x_SHRD, scale)
        else:
            x_SHRD = torch.stack([_filled(x_HTD[:, tile.rows]) for tile in self.tiles])
            x_SHRD = x_SHRD if scale == 1 else x_SHRD * scale
        return x_SHRD

    def keys_of(self, x_KTD: Tensor) -> Tensor:
        """(K, T, D) as (S, K, M, D): own keys, then the prefix's, each filled up with zeros."""
        num_keys = self.tiles[0].shape[0]
        if kernels := kernels_for(x_KTD):
            x_SKMD = x_KTD.new_empty(len(self.tiles), len(x_KTD), num_keys, x_KTD.shape[2])
            kernels.gather(x_KTD, self.keys, x_SKMD[:, :, : self.num_own])
            if num_keys > self.num_own:
                kernels.gather(x_KTD, self.prefixes, x_SKMD[:, :, self.num_own :])
            return x_SKMD
        parts = [torch.stack([_filled(x_KTD[:, tile.keys]) for tile in self.tiles])]
        if num_keys > self.num_own:
            parts.append(torch.stack([_filled(x_KTD[:, tile.prefix]) for tile in self.tiles]))
        return torch.cat(parts, dim=2)

    def put_rows(self, x_SHRD: Tensor, out_HTD: Tensor, scale: float = 1.0) -> None:
        """Write the rows to their places."""
        if kernels := kernels_for(out_HTD):
            kernels.scatter(x_SHRD, self.rows, out_HTD, scale)
            return
        for tile, x_HRD in zip(self.tiles, x_SHRD, strict=True):
            torch.mul(x_HRD[:, : _size(tile.rows)], scale, out=out_HTD[:, tile.rows])

    def put_keys(self, x_SKMD: Tensor, out_KTD: Tensor) -> None:
        """Write what own keys got to their places, or add it where another tile wrote."""
        if kernels := kernels_for(out_KTD):
            kernels.scatter(x_SKMD, self.keys, out_KTD)
            return
        for tile, x_KMD in zip(self.tiles, x_SKMD, strict=True):
            if tile.has_all_keys:
                out_KTD[:, tile.keys] = tile.own(x_KMD)
            else:
                out_KTD[:, tile.keys] += tile.own(x_KMD)

    def softmax(self, scores_SKNM: Tensor) -> Tensor:
        """The probabilities, in the scores' place where that can be."""
        scores_SHRM = self._by_rows(scores_SKNM)
        if kernels := kernels_for(scores_SKNM):
            kernels.softmax_(scores_SHRM, self.spans_SR4)
            return scores_SKNM
        is_small = scores_SHRM[:, 0].numel() <= KEPT_PAIRS
        bias_SRM = (_kept_bias if is_small else _bias)(self, scores_SHRM.dtype, scores_SHRM.device)
        scores_SHRM.add_(bias_SRM[:, None])
        return torch.softmax(scores_SKNM, dim=-1)

    def softmax_back(self, d_SKNM: Tensor, probabilities_SKNM: Tensor) -> Tensor:
        """The gradient of the scores by that of the probabilities."""
        if kernels := kernels_for(d_SKNM):
            kernels.softmax_back_(self._by_rows(d_SKNM), self._by_rows(probabilities_SKNM), self.spans_SR4)
            return d_SKNM
        return torch._softmax_backward_data(d_SKNM, probabilities_SKNM, -1, d_SKNM.dtype)

    def _by_rows(self, x_SKNM: Tensor) -> Tensor:
        return x_SKNM.view(len(x_SKNM), -1, self.spans_SR4.shape[1], x_SKNM.shape[3])


def _places(slices: list[slice], adds: list[bool]) -> Places:
    return Places(
        starts_S=torch.tensor([part.start for part in slices]),
        sizes_S=torch.tensor([_size(part) for part in slices]),
        adds_S=torch.tensor(adds, dtype=torch.int64),
    )


@functools.lru_cache(maxsize=8)  # every layer of a model asks for the same batch
def _stacks(segments: tuple[Segment, ...], window: int | None) -> tuple[_Stack, ...]:
    """All tiles, those of one shape together; of a segment's tiles one with all its keys comes first."""
    stacks = []
    # A tile with all keys of its segment has more than the segment's others.
    tiles = sorted(_tiles(segments, window), key=lambda tile: tile.shape, reverse=True)
    for (num_keys, num_rows, _), alike in itertools.groupby(tiles, key=lambda tile: tile.shape):
        size = max(1, STACKED_PAIRS // (num_keys * num_rows))
        found = tuple(alike)
        stacks += [_Stack.of(found[start : start + size], window) for start in range(0, len(found), size)]
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
            q_SHRD, k_SKMD = stack.rows_of(q_HTD, shape.scale), stack.keys_of(k_KTD)
            p_SKNM, _ = _probabilities(q_SHRD, k_SKMD, stack, shape)
            out_SHRD = (p_SKNM @ stack.keys_of(v_KTD)).view(q_SHRD.shape)
            stack.put_rows(out_SHRD, out_THD.transpose(0, 1))
        ctx.save_for_backward(q_HTD, k_KTD, v_KTD)
        ctx.shape, ctx.covers_all = shape, covers_all
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_THD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_HTD, k_KTD, v_KTD = ctx.saved_tensors
        shape: Shape = ctx.shape
        stacks = _stacks(shape.segments, shape.window)
        tiles = [tile for stack in stacks for tile in stack.tiles]
        num_written = sum(_size(tile.keys) for tile in tiles if tile.has_all_keys)
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
    num_tiles, kv_heads, _, size = k_SKMD.shape
    scores_SKNM = q_SHRD.view(num_tiles, kv_heads, -1, size) @ k_SKMD.transpose(-1, -2)
    slope = None
    if shape.softcap is not None:
        squashed = torch.tanh(scores_SKNM / shape.softcap)
        scores_SKNM, slope = squashed * shape.softcap, 1 - squashed**2
    return stack.softmax(scores_SKNM), slope


def _spans(tile: _Tile, window: int | None) -> Tensor:
    """The ends of the two stretches of keys that a tile's rows see, (R, 4), none for rows that fill up."""
    rows = torch.arange(tile.row, tile.end)
    ends = torch.tensor(tile.lengths).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])[torch.searchsorted(ends, rows, right=True)]
    num_own, num_prefix = _up(_size(tile.keys)), tile.prefix_length
    first, first_of_prefix = starts, torch.zeros_like(rows)
    if window is not None:
        first = torch.maximum(first, rows - window + 1)
        first_of_prefix = (rows - starts + num_prefix - window + 1).clamp(0, num_prefix)
    spans_R4 = torch.zeros(_up(len(rows)), 4, dtype=torch.int32)
    spans_R4[: len(rows), 0] = first - tile.key
    spans_R4[: len(rows), 1] = rows + 1 - tile.key
    spans_R4[: len(rows), 2] = num_own + first_of_prefix
    spans_R4[: len(rows), 3] = num_own + num_prefix
    return spans_R4


def _bias(stack: _Stack, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores, (S, R, M): 0 where a row sees a key, else minus infinity.

    Rows that see nothing see everything: without any key they would have no probabilities.
    """
    begin, end, prefix_begin, prefix_end = stack.spans_SR4.to(device)[..., None].unbind(2)
    keys = torch.arange(stack.tiles[0].shape[0], device=device)
    is_seen = ((begin <= keys) & (keys < end)) | ((prefix_begin <= keys) & (keys < prefix_end)) | (end == 0)
    return torch.zeros(is_seen.shape, dtype=dtype, device=device).masked_fill_(~is_seen, -math.inf)


_kept_bias = functools.lru_cache(maxsize=128)(_bias)


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
