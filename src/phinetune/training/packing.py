"""Decide the row order of each epoch and which rows share a sequence and a batch.

Every decision is a pure function of (settings, seed, epoch): nothing has to be stored to resume.
Knows nothing of tensors, text or models: lengths in, row indices out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phinetune.base.seeds import derive

Rows = tuple[int, ...]  # the rows that share one packed sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How rows become sequences: the part of the settings that packing reads."""

    seqlen: int
    max_sequences: int
    is_packed: bool
    seed: int


def order(num_rows: int, *, seed: int, epoch: int) -> list[int]:
    """The row order of one epoch.

    >>> order(4, seed=42, epoch=0) == order(4, seed=42, epoch=0)
    True
    """
    rows = list(range(num_rows))
    random.Random(derive(seed, "order", epoch)).shuffle(rows)
    return rows


def pack(rows: Sequence[int], lengths: Sequence[int], seqlen: int) -> list[Rows]:
    """Join rows, in order, into sequences of at most `seqlen` tokens; a longer row stands alone.

    >>> pack([0, 1, 2, 3], [4, 5, 2, 9], seqlen=8)
    [(0,), (1, 2), (3,)]
    """
    sequences: list[Rows] = []
    current: list[int] = []
    filled = 0
    for row in rows:
        length = min(lengths[row], seqlen)
        if current and filled + length > seqlen:
            sequences.append(tuple(current))
            current, filled = [], 0
        current.append(row)
        filled += length
    if current:
        sequences.append(tuple(current))
    return sequences


def sample(lengths: Sequence[int], sampling: Sampling, *, in_file_order: bool = False) -> list[int]:
    """The rows that take part at all: as many as fill `max_sequences` sequences, chosen by the seed.

    With `in_file_order` the rows come sorted (for the test set); else in the order of epoch 0.
    """
    rows = order(len(lengths), seed=sampling.seed, epoch=0)
    sequences = _sequences(rows, lengths, sampling)[: sampling.max_sequences]
    chosen = [row for sequence in sequences for row in sequence]
    if not in_file_order:
        return chosen
    # In another order the same rows may need a sequence more; then the last chosen stay out.
    while len(_sequences(sorted(chosen), lengths, sampling)) > sampling.max_sequences:
        chosen.pop()
    return sorted(chosen)


def epoch_sequences(
    rows: Sequence[int], lengths: Sequence[int], sampling: Sampling, epoch: int
) -> list[Rows]:
    """The sequences of one epoch over the sampled rows, in a new order each epoch.

    Rows are packed once: every epoch has the same sequences, so that the plan's number of steps is exact.
    """
    sequences = _sequences(rows, lengths, sampling)
    return [sequences[place] for place in order(len(sequences), seed=sampling.seed, epoch=epoch)]


def file_sequences(rows: Sequence[int], lengths: Sequence[int], sampling: Sampling) -> list[Rows]:
    """The sequences of the test set: in file order, the same at every evaluation."""
    return _sequences(rows, lengths, sampling)


def batches(sequences: Sequence[Rows], batch_size: int) -> Iterator[list[Rows]]:
    """Consecutive groups of `batch_size` sequences; the last may be smaller."""
    for start in range(0, len(sequences), batch_size):
        yield list(sequences[start : start + batch_size])


def _sequences(rows: Sequence[int], lengths: Sequence[int], sampling: Sampling) -> list[Rows]:
    if sampling.is_packed:
        return pack(rows, lengths, sampling.seqlen)
    return [(row,) for row in rows]
