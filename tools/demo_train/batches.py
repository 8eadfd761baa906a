"""Training rows drawn from token streams by weight. Knows no corpus and no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from demo_text.rendering import NO_LOSS
from numpy.typing import NDArray
from torch import Tensor

from demo_train.model import IGNORED

Tokens = tuple[NDArray[np.uint16], NDArray[np.int64]]  # ids end to end, document starts


@dataclass(slots=True)
class FixedStream:
    """A corpus tokenised once; a row starts at a document's start, or anywhere inside a long one."""

    ids: NDArray[np.uint16]
    starts: NDArray[np.int64]

    def row(self, rng: np.random.Generator, length: int) -> NDArray[np.uint16]:
        """`length` ids; wraps around at the end of the stream."""
        start = (
            int(self.starts[rng.integers(len(self.starts))])
            if rng.random() < 0.5
            else int(rng.integers(len(self.ids)))
        )
        return np.take(self.ids, np.arange(start, start + length), mode="wrap")


@dataclass(slots=True)
class FreshStream:
    """Generated documents: a chunk is used once from front to back, then the next seed makes a new one."""

    make: Callable[[int], Tokens]
    next_seed: int
    ids: NDArray[np.uint16] | None = None
    at: int = 0

    def row(self, rng: np.random.Generator, length: int) -> NDArray[np.uint16]:
        """The next `length` ids."""
        if self.ids is None or self.at + length > len(self.ids):
            self.ids, _ = self.make(self.next_seed)
            self.next_seed += 1
            self.at = 0
        row = self.ids[self.at : self.at + length]
        self.at += length - 1
        return row


@dataclass(slots=True)
class RandomRepeats:
    """Rows of uniformly random ids in which a block, mostly short, comes back; only repeats are learnt."""

    low: int
    high: int

    def row(self, rng: np.random.Generator, length: int) -> NDArray[np.uint16]:
        """`length` ids."""
        parts: list[NDArray[np.uint16]] = []
        size = 0
        while size < length:
            block = rng.integers(self.low, self.high, size=int(2 ** rng.uniform(1, 6.2))).astype(np.uint16)
            times = int(rng.integers(2, 5))
            parts += [block | np.uint16(NO_LOSS), *([block] * (times - 1))]
            size += len(block) * times
        return np.concatenate(parts)[:length]


Stream = FixedStream | FreshStream | RandomRepeats


def to_tensors(rows: list[NDArray[np.uint16]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, length - 1]; marked ids are no targets."""
    stacked = np.stack(rows).astype(np.int64)
    ids = stacked & (NO_LOSS - 1)
    targets = np.where(stacked & NO_LOSS, IGNORED, ids)
    return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy())


@dataclass(slots=True)
class Mixer:
    """Draws rows from named streams."""

    streams: dict[str, Stream]
    rng: np.random.Generator

    def rows(
        self, count: int, length: int, weights: dict[str, float]
    ) -> tuple[Tensor, Tensor, dict[str, int]]:
        """A micro-batch of `count` rows of `length` predictions, and how many rows came from each stream."""
        names = list(weights)
        shares = np.array([weights[name] for name in names])
        drawn = [names[i] for i in self.rng.choice(len(names), size=count, p=shares / shares.sum())]
        ids, targets = to_tensors([self.streams[name].row(self.rng, length + 1) for name in drawn])
        return ids, targets, {name: drawn.count(name) for name in set(drawn)}
