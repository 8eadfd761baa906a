"""Decide the row order of each epoch and which rows share a sequence and a batch.

Every decision is a pure function of (settings, seed, epoch): nothing has to be stored to resume.
Knows nothing of tensors, text or models: lengths in, row indices out.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import overload

from phinetune.base.seeds import derive

Rows = tuple[int, ...]  # the rows that share one packed sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How rows become sequences: the part of the settings that packing reads."""

    seqlen: int
    max_sequences: int
    is_packed: bool
    seed: int


class Sequences(Sequence[Rows]):
    """Sequences as flat arrays: 8 bytes a row and 16 a sequence, however many there are.

    >>> list(Sequences([(0,), (1, 2)]))
    [(0,), (1, 2)]
    """

    __slots__ = ("_ends", "_places", "_rows")

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        self._rows, self._ends = array("q"), array("q")
        for sequence in sequences:
            self._rows.extend(sequence)
            self._ends.append(len(self._rows))
        self._places: Sequence[int] = range(len(self._ends))

    @property
    def rows(self) -> Sequence[int]:
        """All rows, in the order in which they were packed."""
        return self._rows

    def in_order(self, places: Sequence[int]) -> Sequences:
        """The same sequences in another order, without a copy of their rows."""
        other = Sequences(())
        other._rows, other._ends, other._places = self._rows, self._ends, places
        return other

    @overload
    def __getitem__(self, place: int) -> Rows: ...
    @overload
    def __getitem__(self, place: slice) -> list[Rows]: ...
    def __getitem__(self, place: int | slice) -> Rows | list[Rows]:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        own = self._places[place]
        return tuple(self._rows[self._ends[own - 1] if own else 0 : self._ends[own]])

    def __len__(self) -> int:
        return len(self._places)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def order(num_rows: int, *, seed: int, epoch: int) -> array[int]:
    """The row order of one epoch.

    >>> order(4, seed=42, epoch=0) == order(4, seed=42, epoch=0)
    True
    """
    rows = array("q", range(num_rows))
    random.Random(derive(seed, "order", epoch)).shuffle(rows)
    return rows


def pack(rows: Sequence[int], lengths: Sequence[int], seqlen: int) -> Iterator[Rows]:
    """Join rows, in order, into sequences of at most `seqlen` tokens; a longer row stands alone.

    >>> list(pack([0, 1, 2, 3], [4, 5, 2, 9], seqlen=8))
    [(0,), (1, 2), (3,)]
    """
    current: list[int] = []
    filled = 0
    for row in rows:
        length = min(lengths[row], seqlen)
        if current and filled + length > seqlen:
            yield tuple(current)
            current, filled = [], 0
        current.append(row)
        filled += length
    if current:
        yield tuple(current)


def sample(lengths: Sequence[int], sampling: Sampling, *, in_file_order: bool = False) -> Sequence[int]:
    """The rows that take part at all: as many as fill `max_sequences` sequences, chosen by the seed.

    With `in_file_order` the rows come sorted (for the test set); else in the order of epoch 0.
    """
    rows = order(len(lengths), seed=sampling.seed, epoch=0)
    chosen = array("q")
    for sequence in islice(_sequences(rows, lengths, sampling), sampling.max_sequences):
        chosen.extend(sequence)
    if not in_file_order:
        return chosen
    # In another order the same rows may need a sequence more; then the last chosen stay out.
    while sum(1 for _ in _sequences(sorted(chosen), lengths, sampling)) > sampling.max_sequences:
        chosen.pop()
    return sorted(chosen)


def packed(rows: Sequence[int], lengths: Sequence[int], sampling: Sampling) -> Sequences:
    """The sequences that these rows make, in their order."""
    return Sequences(_sequences(rows, lengths, sampling))


def epoch_sequences(sequences: Sequences, *, seed: int, epoch: int) -> Sequences:
    """The training set's sequences in the order of one epoch, a new one each.

    Rows are packed once: every epoch has the same sequences, so that the plan's number of steps is exact.
    """
    return sequences.in_order(order(len(sequences), seed=seed, epoch=epoch))


def batches(sequences: Sequence[Rows], batch_size: int) -> Iterator[list[Rows]]:
    """Consecutive groups of `batch_size` sequences; the last may be smaller."""
    for start in range(0, len(sequences), batch_size):
        yield list(sequences[start : start + batch_size])


def _sequences(rows: Sequence[int], lengths: Sequence[int], sampling: Sampling) -> Iterator[Rows]:
    if sampling.is_packed:
        return pack(rows, lengths, sampling.seqlen)
    return ((row,) for row in rows)
