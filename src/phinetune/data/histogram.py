"""Counts of lengths in bins with round edges: even ones, or 1, 2, 5, 10, 20 … where values lie far apart.

Knows nothing of what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_BINS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """How many values lie from `low` to `high`, both included."""

    low: int
    high: int
    count: int

    @property
    def label(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,}–{self.high:,}"


def histogram(values: Sequence[int]) -> list[Bin]:
    """Bins from the least to the greatest value, empty ones between them included.

    >>> [(bin.label, bin.count) for bin in histogram([3, 4, 7, 12])]
    [('3', 1), ('4', 1), ('5', 0), ('6', 0), ('7', 1), ('8', 0), ('9', 0), ('10', 0), ('11', 0), ('12', 1)]
    >>> [(bin.label, bin.count) for bin in histogram([1, 4, 7, 60])]
    [('1', 1), ('2–4', 1), ('5–9', 1), ('10–19', 0), ('20–49', 0), ('50–99', 1)]
    """
    if not len(values):
        return []
    found = np.asarray(values, dtype=np.int64)
    least, greatest = int(found.min()), int(found.max())
    edges = _even_edges(least, greatest) if greatest < 20 * max(least, 1) else _growing_edges(greatest)
    counts, _ = np.histogram(found, bins=np.array([*edges[:-1], edges[-1] - 0.5]))
    bins = [
        Bin(low=low, high=high - 1, count=int(count))
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        if high > least
    ]
    return bins[-MAX_BINS:] if len(bins) <= MAX_BINS else _joined(bins)


def _growing_edges(greatest: int) -> list[int]:
    edges = [0, 1]
    while edges[-1] <= greatest:
        edges.append(edges[-1] * 2 if str(edges[-1])[0] in "15" else edges[-1] // 2 * 5)
    return edges


def _even_edges(least: int, greatest: int) -> list[int]:
    """Edges a round step apart, for values of one magnitude."""
    step = 1
    while (greatest - least) // step >= MAX_BINS - 2:
        step = step * 2 if str(step)[0] in "15" else step // 2 * 5
    return list(range(least // step * step, greatest + step + 1, step))


def _joined(bins: list[Bin]) -> list[Bin]:
    """The lowest bins made one, so that all values stay counted."""
    few, rest = bins[: len(bins) - MAX_BINS + 1], bins[len(bins) - MAX_BINS + 1 :]
    return [Bin(low=few[0].low, high=few[-1].high, count=sum(bin.count for bin in few)), *rest]


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Least, median, 95 %, greatest; empty for no values."""
    if not len(values):
        return {}
    found = np.asarray(values)
    named = {"least": 0.0, "median": 0.5, "95 %": 0.95, "greatest": 1.0}
    return {name: int(np.quantile(found, share, method="lower")) for name, share in named.items()}
