"""Tiles of one shape as one tensor: rows gathered from the batch, probabilities, and the way back.

Each in a kernel of C where the machine could compile them, else by PyTorch. Knows nothing of how tiles are
cut.

# H query heads, K key heads, T tokens of the batch, D head size; S tiles of R rows and M keys, N = R H / K
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from phinetune.kernels.calls import Places, kernels_for
from phinetune.models.attention_tiles import (
    TILE_MULTIPLE,
    Segment,
    Tile,
    filled_up,
    num_places,
    spans_of,
    tiles_of,
)

# Pairs of rows and keys computed together, unless one tile has more: what is held of each head at once.
STACKED_PAIRS = 1 << 16
# Masks up to this size are kept: every layer needs the same ones, and long segments' would fill the memory.
KEPT_PAIRS = 1 << 18


def _filled(x_HLD: Tensor) -> Tensor:
    """With zeros after the last row, up to a multiple."""
    return pad(x_HLD, (0, 0, 0, -x_HLD.shape[1] % TILE_MULTIPLE))


Tiles = tuple[Tile, ...]  # of one shape


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Tiles of one shape, which are computed together: where their rows are, and what these see.

    `spans_SR4` holds the ends of the two stretches of keys that each row sees: own ones, and the prefix's.
    """

    tiles: Tiles
    rows: Places
    keys: Places
    prefixes: Places
    spans_SR4: Tensor

    @classmethod
    def of(cls, tiles: Tiles, window: int | None) -> Stack:
        adds = [not tile.has_all_keys for tile in tiles]
        return cls(
            tiles=tiles,
            rows=_places([tile.rows for tile in tiles], [False] * len(tiles)),
            keys=_places([tile.keys for tile in tiles], adds),
            prefixes=_places([tile.prefix for tile in tiles], adds),
            spans_SR4=torch.stack([spans_of(tile, window) for tile in tiles]),
        )

    @property
    def num_own(self) -> int:
        """The keys that are no prefix's, filled up."""
        return filled_up(num_places(self.tiles[0].keys))

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
            torch.mul(x_HRD[:, : num_places(tile.rows)], scale, out=out_HTD[:, tile.rows])

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
        sizes_S=torch.tensor([num_places(part) for part in slices]),
        adds_S=torch.tensor(adds, dtype=torch.int64),
    )


@functools.lru_cache(maxsize=8)  # every layer of a model asks for the same batch
def stacks_of(segments: tuple[Segment, ...], window: int | None) -> tuple[Stack, ...]:
    """All tiles, those of one shape together; of a segment's tiles one with all its keys comes first."""
    stacks = []
    # A tile with all keys of its segment has more than the segment's others.
    tiles = sorted(tiles_of(segments, window), key=lambda tile: tile.shape, reverse=True)
    for (num_keys, num_rows, _), alike in itertools.groupby(tiles, key=lambda tile: tile.shape):
        size = max(1, STACKED_PAIRS // (num_keys * num_rows))
        found = tuple(alike)
        stacks += [Stack.of(found[start : start + size], window) for start in range(0, len(found), size)]
    return tuple(stacks)


def _bias(stack: Stack, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores, (S, R, M): 0 where a row sees a key, else minus infinity.

    Rows that see nothing see everything: without any key they would have no probabilities.
    """
    begin, end, prefix_begin, prefix_end = stack.spans_SR4.to(device)[..., None].unbind(2)
    keys = torch.arange(stack.tiles[0].shape[0], device=device)
    is_seen = ((begin <= keys) & (keys < end)) | ((prefix_begin <= keys) & (keys < prefix_end)) | (end == 0)
    return torch.zeros(is_seen.shape, dtype=dtype, device=device).masked_fill_(~is_seen, -math.inf)


_kept_bias = functools.lru_cache(maxsize=128)(_bias)
