"""Attention's work cut into tiles: rows of one segment, or of short neighbours, with the keys they see.

A segment may continue a prefix, a stretch of tokens elsewhere in the batch: its rows see its keys too.
Knows nothing of how attention is computed. # K key heads, D head size; a tile has R rows and M keys
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of one tile at most: keys after a tile's last row are never multiplied.
TILE_ROWS = 256
# Neighbours are one tile up to so many tokens together: a tile more costs more than products in vain.
JOINED_TOKENS = 64
# Rows and keys of a tile are filled up to a multiple: odd shapes are slow, and new ones have to be prepared.
TILE_MULTIPLE = 32


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
class Tile:
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
        own = filled_up(num_places(self.keys))
        return own + filled_up(self.prefix_length), filled_up(num_places(self.rows)), self.prefix_length

    def own(self, x_KMD: Tensor) -> Tensor:
        """The own keys' part of such a tensor."""
        return x_KMD[:, : num_places(self.keys)]

    def of_prefix(self, x_KMD: Tensor) -> Tensor:
        """The prefix's part of such a tensor."""
        start = filled_up(num_places(self.keys))
        return x_KMD[:, start : start + num_places(self.prefix)]


def num_places(places: slice) -> int:
    return int(places.stop - places.start)


def filled_up(number: int) -> int:
    return -(-number // TILE_MULTIPLE) * TILE_MULTIPLE


def tiles_of(segments: tuple[Segment, ...], window: int | None) -> list[Tile]:
    found = []
    for joined in _neighbours(segments):
        lengths = tuple(segment.length for segment in joined)
        length = sum(lengths)
        num_rows = filled_up(-(-length // -(-length // TILE_ROWS)))
        for row in range(0, length, num_rows):
            key = 0 if window is None else max(0, row - window + 1)
            end = min(row + num_rows, length)
            found.append(
                Tile(
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


def spans_of(tile: Tile, window: int | None) -> Tensor:
    """The ends of the two stretches of keys that a tile's rows see, (R, 4), none for rows that fill up."""
    rows = torch.arange(tile.row, tile.end)
    ends = torch.tensor(tile.lengths).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])[torch.searchsorted(ends, rows, right=True)]
    num_own, num_prefix = filled_up(num_places(tile.keys)), tile.prefix_length
    first, first_of_prefix = starts, torch.zeros_like(rows)
    if window is not None:
        first = torch.maximum(first, rows - window + 1)
        first_of_prefix = (rows - starts + num_prefix - window + 1).clamp(0, num_prefix)
    spans_R4 = torch.zeros(filled_up(len(rows)), 4, dtype=torch.int32)
    spans_R4[: len(rows), 0] = first - tile.key
    spans_R4[: len(rows), 1] = rows + 1 - tile.key
    spans_R4[: len(rows), 2] = num_own + first_of_prefix
    spans_R4[: len(rows), 3] = num_own + num_prefix
    return spans_R4
