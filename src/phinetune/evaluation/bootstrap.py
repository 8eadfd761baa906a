"""How far a measured difference could lie off: the 95 % interval of a paired bootstrap over examples.

Knows nothing of what is measured. Axes: N examples, M measures, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from phinetune.evaluation.metrics import LOWER_IS_BETTER

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
# Below this, all examples pointing one way happens by chance more than once in twenty times.
MIN_EXAMPLES = 6
_MAX_COUNTS = 4_000_000  # counts held at once: resamples times examples

Floats = NDArray[np.float64]
Reading = Literal["better", "worse", "no clear difference", "too few examples"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedMeasure:
    """One measure of two systems on the same examples: sum(base_N) / sum(weight_N), likewise for adapter.

    For a loss the numerators are summed losses and the weights trained tokens; for a rate they are 0 or 1
    and 1. An example that a measure does not concern has weight 0 and both numerators 0.
    """

    base_N: Floats
    adapter_N: Floats
    weight_N: Floats
    is_exponential: bool = False  # the measure is e to the ratio: perplexity


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Adapter minus base, with its 95 % interval; low and high are None when examples are too few."""

    value: float
    low: float | None
    high: float | None


def reading(metric: str, difference: Difference) -> Reading:
    """The difference in words; better or worse only when the interval leaves 0 out.

    >>> reading("loss", Difference(value=-0.5, low=-0.7, high=-0.3))
    'better'
    """
    if difference.low is None or difference.high is None:
        return "too few examples"
    if difference.low <= 0 <= difference.high:
        return "no clear difference"
    return "better" if (difference.value < 0) == (metric in LOWER_IS_BETTER) else "worse"


def totals(measure: PairedMeasure) -> tuple[float, float]:
    """The measure of base and of adapter over all examples; NaN when no example concerns it."""
    weight = measure.weight_N.sum()
    sums_2 = np.array([measure.base_N.sum(), measure.adapter_N.sum()])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios_2 = sums_2 / weight
        values_2 = np.exp(ratios_2) if measure.is_exponential else ratios_2
    return float(values_2[0]), float(values_2[1])


def paired_bootstrap(
    measures: Mapping[str, PairedMeasure], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> dict[str, Difference]:
    """The difference of each measure with its percentile interval.

    Examples are drawn with replacement, base and adapter always together, and every measure is formed anew
    from the drawn examples' sums. All measures must have the same N. The same seed gives the same intervals.
    """
    if not measures:
        return {}
    columns_N3M = np.stack(
        [column for measure in measures.values() for column in _columns(measure)], axis=1, dtype=np.float64
    )
    sums_R3M = resampled_sums(columns_N3M, seed, num_resamples)
    return {
        name: _difference(measure, sums_R3M[:, 3 * index : 3 * index + 3])
        for index, (name, measure) in enumerate(measures.items())
    }


def _columns(measure: PairedMeasure) -> Sequence[Floats]:
    return measure.base_N, measure.adapter_N, measure.weight_N


def resampled_sums(columns: Floats, seed: int, num_resamples: int) -> Floats:
    """Sums of each column over `num_resamples` draws of N examples, [R, columns]."""
    num_examples = len(columns)
    random = np.random.default_rng(seed)
    rows = max(1, _MAX_COUNTS // max(1, num_examples))
    parts = []
    for start in range(0, num_resamples, rows):
        num_rows = min(rows, num_resamples - start)
        drawn = random.integers(num_examples, size=(num_rows, num_examples))
        drawn += np.arange(num_rows)[:, None] * num_examples
        counts = np.bincount(drawn.ravel(), minlength=num_rows * num_examples)
        parts.append(counts.reshape(num_rows, num_examples).astype(np.float64) @ columns)
    return np.concatenate(parts)


def _difference(measure: PairedMeasure, sums_R3: Floats) -> Difference:
    base, adapter = totals(measure)
    if np.count_nonzero(measure.weight_N) < MIN_EXAMPLES:
        return Difference(value=adapter - base, low=None, high=None)
    # A resample may by chance hold no example of a rare measure; it says nothing then.
    sums_R3 = sums_R3[sums_R3[:, 2] > 0]
    ratios_R2 = sums_R3[:, :2] / sums_R3[:, 2:]
    if measure.is_exponential:
        ratios_R2 = np.exp(np.minimum(ratios_R2, 700.0))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios_R2[:, 1] - ratios_R2[:, 0], [tail, 1 - tail])
    return Difference(value=adapter - base, low=float(low), high=float(high))
