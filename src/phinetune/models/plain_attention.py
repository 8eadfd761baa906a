"""Attention by plain matrix products, one autograd function over many segments.

Short segments are padded to a common length and computed together, longer ones by blocks of rows. A
segment may continue a prefix, a stretch of tokens elsewhere in the batch: its rows see the prefix's keys
too, and every continuation adds its part to the prefix's gradient. Knows nothing of models.
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

# Rows of queries worked on at once: keys after a block's last row are never multiplied.
BLOCK_ROWS = 128
# Segments up to this length are computed together, padded to the longest of their group; of one and a half
# times the length of the shortest at most. Padding stands at the end, where causal attention cannot see it.
GROUP_UP_TO = 160
GROUP_SPREAD = 1.5
# Pairs of rows and keys of a group, unless one segment has more: what is held of each head at once.
GROUP_PAIRS = 1 << 20
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

    def blocks(self) -> Iterator[_Block]:
        """The blocks of rows of the segments that stand alone."""
        for segment in self.segments:
            if segment.length <= GROUP_UP_TO:
                continue
            for row in range(segment.prefix_length, segment.end, BLOCK_ROWS):
                first_key = 0 if self.window is None else max(0, row - self.window + 1)
                yield _Block(segment, first_key, row, min(row + BLOCK_ROWS, segment.end))


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of one segment and the keys they may see; `key`, `row` and `end` are positions."""

    segment: Segment
    key: int
    row: int
    end: int

    @property
    def rows(self) -> slice:
        """The rows' places in the batch."""
        offset = self.segment.start - self.segment.prefix_length
        return slice(offset + self.row, offset + self.end)

    @property
    def own_keys(self) -> slice:
        offset = self.segment.start - self.segment.prefix_length
        return slice(offset + max(self.key, self.segment.prefix_length), offset + self.end)

    @property
    def prefix_keys(self) -> slice:
        start, length = self.segment.prefix_start, self.segment.prefix_length
        return slice(start + min(self.key, length), start + length)

    @property
    def num_prefix_keys(self) -> int:
        return max(0, self.segment.prefix_length - self.key)

    def keys(self, x_KTD: Tensor) -> Tensor:
        """(K, T, D) as (K, M, D), from `key` to `end`."""
        own = x_KTD[:, self.own_keys]
        return torch.cat([x_KTD[:, self.prefix_keys], own], dim=1) if self.num_prefix_keys else own


@dataclass(frozen=True, slots=True)
class _Group:
    """S segments padded to L tokens: `take_SL` reads a token of the batch for every place (any, for
    padding), `put_N` and `back_N` name the real tokens' places in the batch and in the group. All continue
    one `prefix`, of P tokens; their M = P + L keys are read by `keys_SM`."""

    take_SL: Tensor
    keys_SM: Tensor
    put_N: Tensor
    back_N: Tensor
    prefix: slice

    @property
    def num_prefix_keys(self) -> int:
        return self.prefix.stop - self.prefix.start  # type: ignore[no-any-return]

    def unpadded(self, x_HSLD: Tensor) -> Tensor:
        """(H, S, L, D) as (H, N, D), without the padding."""
        return x_HSLD.flatten(1, 2).index_select(1, self.back_N)


def _taken(x_HTD: Tensor, places_SL: Tensor) -> Tensor:
    """(H, T, D) as (H, S, L, D)."""
    return x_HTD.index_select(1, places_SL.flatten()).reshape(len(x_HTD), *places_SL.shape, -1)


@functools.lru_cache(maxsize=8)
def _groups(segments: tuple[Segment, ...], device: torch.device) -> tuple[_Group, ...]:
    """The shorter segments, those of one prefix and of like length together."""
    short = sorted(
        (segment for segment in segments if segment.length <= GROUP_UP_TO),
        key=lambda segment: (segment.prefix_start, segment.prefix_length, segment.length, segment.start),
    )
    groups = []
    while short:
        least = short[0]
        prefix = (least.prefix_start, least.prefix_length)
        alike = [
            s.length * s.end
            for s in short
            if (s.prefix_start, s.prefix_length) == prefix and s.length <= least.length * GROUP_SPREAD
        ]
        # Padded to the longest, which is the last.
        count = sum(number * pairs <= GROUP_PAIRS for number, pairs in enumerate(alike, start=1)) or 1
        groups.append(_group(short[:count], device))
        short = short[count:]
    return tuple(groups)


def _group(short: list[Segment], device: torch.device) -> _Group:
    lengths = torch.tensor([segment.length for segment in short])
    starts = torch.tensor([segment.start for segment in short])
    prefix = slice(short[0].prefix_start, short[0].prefix_start + short[0].prefix_length)
    # A multiple of 16, so that products of the same shape come again: each new shape has to be prepared.
    place_L = torch.arange(-(-int(lengths.max()) // 16) * 16)
    is_real_SL = place_L < lengths[:, None]
    take_SL = starts[:, None] + torch.minimum(place_L, lengths[:, None] - 1)
    prefix_SP = torch.arange(prefix.start, prefix.stop).expand(len(short), -1)
    back_N = is_real_SL.flatten().nonzero().squeeze(1)
    put_N = take_SL.flatten()[back_N]
    keys_SM = torch.cat([prefix_SP, take_SL], dim=1)
    return _Group(take_SL.to(device), keys_SM.to(device), put_N.to(device), back_N.to(device), prefix)


class PlainAttention(torch.autograd.Function):
    """Softmax attention by blocks of rows; probabilities are formed again in the backward pass.

    One function for all segments: slicing under autograd would build a gradient of full size for
    every slice. Rows of no segment are zero. # g = H / K queries share a key head; N rows of a block,
    M keys it may see
    """

    @staticmethod
    def forward(ctx: Any, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, shape: Shape) -> Tensor:
        heads, tokens, size = q_HTD.shape
        covers_all = sum(segment.length for segment in shape.segments) == tokens
        out_THD = (q_HTD.new_empty if covers_all else q_HTD.new_zeros)(tokens, heads, size)
        for group in _groups(shape.segments, q_HTD.device):
            q, k, v = _taken(q_HTD, group.take_SL), _taken(k_KTD, group.keys_SM), _taken(v_KTD, group.keys_SM)
            p_KSgLM, _ = _group_probabilities(q, k, group, shape)
            out = _ungrouped_heads(_grouped(p_KSgLM) @ v, heads)
            out_THD[group.put_N] = group.unpadded(out).transpose(0, 1)
        for block in shape.blocks():
            p_KgNM, _ = _probabilities(q_HTD, block.keys(k_KTD), block, shape)
            out_THD[block.rows] = _flat(_grouped(p_KgNM) @ block.keys(v_KTD), heads).transpose(0, 1)
        ctx.save_for_backward(q_HTD, k_KTD, v_KTD)
        ctx.shape, ctx.covers_all = shape, covers_all
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_THD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_HTD, k_KTD, v_KTD = ctx.saved_tensors
        shape: Shape = ctx.shape
        kv_heads = k_KTD.shape[0]
        dq_HTD = torch.empty_like(q_HTD) if ctx.covers_all else torch.zeros_like(q_HTD)
        dk_KTD, dv_KTD = torch.zeros_like(k_KTD), torch.zeros_like(v_KTD)
        of_prefixes = _PrefixGradients()
        for group in _groups(shape.segments, q_HTD.device):
            q, k, v = _taken(q_HTD, group.take_SL), _taken(k_KTD, group.keys_SM), _taken(v_KTD, group.keys_SM)
            # A padded row repeats the last token; its gradient is none.
            d_out = torch.zeros_like(q)
            d_out.flatten(1, 2)[:, group.back_N] = d_out_THD[group.put_N].transpose(0, 1)
            p_KSgLM, slope = _group_probabilities(q, k, group, shape)
            p = _grouped(p_KSgLM)
            d_out, q = _heads_of_keys(d_out, kv_heads), _heads_of_keys(q, kv_heads)
            ds = torch._softmax_backward_data(d_out @ v.transpose(-1, -2), p, -1, p.dtype).mul_(shape.scale)
            if slope is not None:
                ds *= _grouped(slope)
            dq_HTD[:, group.put_N] = group.unpadded(_ungrouped_heads(ds @ k, q_HTD.shape[0]))
            dk_KSMD, dv_KSMD = ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ d_out
            num_prefix = group.num_prefix_keys
            dk_KTD[:, group.put_N] = group.unpadded(dk_KSMD[:, :, num_prefix:])
            dv_KTD[:, group.put_N] = group.unpadded(dv_KSMD[:, :, num_prefix:])
            of_prefixes.add(group.prefix, dk_KSMD[:, :, :num_prefix], dv_KSMD[:, :, :num_prefix])
        for block in shape.blocks():
            k_KMD, v_KMD = block.keys(k_KTD), block.keys(v_KTD)
            p_KgNM, slope = _probabilities(q_HTD, k_KMD, block, shape)
            p_KRM = _grouped(p_KgNM)
            d_out_KRD = d_out_THD[block.rows].transpose(0, 1).reshape(kv_heads, -1, q_HTD.shape[2])
            q_KRD = q_HTD[:, block.rows].reshape(kv_heads, -1, q_HTD.shape[2])
            dp_KRM = d_out_KRD @ v_KMD.transpose(1, 2)
            ds_KRM = torch._softmax_backward_data(dp_KRM, p_KRM, -1, p_KRM.dtype).mul_(shape.scale)
            if slope is not None:
                ds_KRM *= _grouped(slope)
            dq_HTD[:, block.rows] = _flat(ds_KRM @ k_KMD, q_HTD.shape[0])
            dk_KMD, dv_KMD = ds_KRM.transpose(1, 2) @ q_KRD, p_KRM.transpose(1, 2) @ d_out_KRD
            num_prefix = block.num_prefix_keys
            dk_KTD[:, block.own_keys] += dk_KMD[:, num_prefix:]
            dv_KTD[:, block.own_keys] += dv_KMD[:, num_prefix:]
            of_prefixes.add(block.prefix_keys, dk_KMD[:, None, :num_prefix], dv_KMD[:, None, :num_prefix])
        of_prefixes.put(dk_KTD, dv_KTD)
        return dq_HTD, dk_KTD, dv_KTD, None


class _PrefixGradients:
    """What the continuations of prefixes add to their keys' and values' gradients, summed in float32.

    Put in place at the end: a prefix's own rows are computed among the others and set theirs first.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def add(self, prefix: slice, dk_KSPD: Tensor, dv_KSPD: Tensor) -> None:
        """Add the gradients of S segments."""
        if prefix.start == prefix.stop:
            return
        dk, dv = dk_KSPD.sum(1, dtype=torch.float32), dv_KSPD.sum(1, dtype=torch.float32)
        place = (prefix.start, prefix.stop)
        if place in self._sums:
            dk, dv = self._sums[place][0] + dk, self._sums[place][1] + dv
        self._sums[place] = dk, dv

    def put(self, dk_KTD: Tensor, dv_KTD: Tensor) -> None:
        for (start, stop), (dk_KPD, dv_KPD) in self._sums.items():
            dk_KTD[:, start:stop] += dk_KPD
            dv_KTD[:, start:stop] += dv_KPD


def _probabilities(q_HTD: Tensor, k_KMD: Tensor, block: _Block, shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Attention of a block's rows over its keys, (K, g, N, M), and the slope of a soft cap."""
    kv_heads, num_keys, size = k_KMD.shape
    q_KRD = (q_HTD[:, block.rows] * shape.scale).reshape(kv_heads, -1, size)
    scores = (q_KRD @ k_KMD.transpose(1, 2)).view(kv_heads, -1, block.end - block.row, num_keys)
    return _softmax(scores, shape)


def _group_probabilities(
    q_HSLD: Tensor, k_KSMD: Tensor, group: _Group, shape: Shape
) -> tuple[Tensor, Tensor | None]:
    """Attention of every row of a group over its prefix and its segment, (K, S, g, L, M)."""
    kv_heads, num_segments, num_keys, _ = k_KSMD.shape
    q = _heads_of_keys(q_HSLD * shape.scale, kv_heads)
    scores = q @ k_KSMD.transpose(-1, -2)
    return _softmax(scores.view(kv_heads, num_segments, -1, q_HSLD.shape[2], num_keys), shape)


def _softmax(scores_NM: Tensor, shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Probabilities of the last two axes' scores, whose last rows and keys stand at the same positions."""
    num_rows, num_keys = scores_NM.shape[-2:]
    slope = None
    if shape.softcap is not None:
        squashed = torch.tanh(scores_NM / shape.softcap)
        scores_NM, slope = squashed * shape.softcap, 1 - squashed**2
    first = num_keys - num_rows
    if shape.window is None:  # only the last, square part holds keys in the future
        scores_NM[..., first:].masked_fill_(hidden(0, num_rows, None, scores_NM.device), -math.inf)
    else:
        scores_NM.masked_fill_(hidden(first, num_keys, shape.window, scores_NM.device), -math.inf)
    return torch.softmax(scores_NM, dim=-1), slope


def _heads_of_keys(x_HSLD: Tensor, kv_heads: int) -> Tensor:
    """(H, S, L, D) as (K, S, g * L, D): the queries of a key head one below the other."""
    x_KgSLD = x_HSLD.view(kv_heads, -1, *x_HSLD.shape[1:])
    return x_KgSLD.transpose(1, 2).flatten(2, 3)


def _ungrouped_heads(x_KSRD: Tensor, heads: int) -> Tensor:
    """(K, S, g * L, D) as (H, S, L, D)."""
    kv_heads, num_segments, _, size = x_KSRD.shape
    x_KSgLD = x_KSRD.view(kv_heads, num_segments, heads // kv_heads, -1, size)
    return x_KSgLD.transpose(1, 2).flatten(0, 1)


def _grouped(x_KgNM: Tensor) -> Tensor:
    """(K, g, N, M) as (K, g * N, M), so that one product serves all queries of a key head."""
    return x_KgNM.flatten(-3, -2)


def _flat(x_KRD: Tensor, heads: int) -> Tensor:
    """(K, g * N, D) as (H, N, D)."""
    return x_KRD.view(heads, -1, x_KRD.shape[2])


def hidden(first_row: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """True where row (first_row..end) may not see key (0..end): later, or out of the window."""
    is_small = (end - first_row) * end <= KEPT_PAIRS
    return (_kept if is_small else _compared)(first_row, end, window, device)


def _compared(first_row: int, end: int, window: int | None, device: torch.device) -> Tensor:
    rows = torch.arange(first_row, end, device=device)[:, None]
    keys = torch.arange(0, end, device=device)[None]
    is_hidden = keys > rows
    return is_hidden if window is None else is_hidden | (keys <= rows - window)


_kept = functools.lru_cache(maxsize=256)(_compared)
