"""Macro-F1 of two systems on the same examples, with the paired bootstrap's interval of their difference.

    # N examples, C classes, R resamples

Per class F1 is 2 TP / (predicted + true); the mean goes over the classes that are predicted or true at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phinetune.evaluation.answers import Answered
from phinetune.evaluation.bootstrap import (
    CONFIDENCE,
    MIN_EXAMPLES,
    NUM_RESAMPLES,
    Difference,
    Floats,
    resampled_sums,
)

Integers = NDArray[np.int64]


def macro_f1(true_N: Integers, predicted_N: Integers, num_classes: int) -> float:
    """The mean F1 over the classes that occur; NaN without examples.

    >>> float(round(macro_f1(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]), 4), 4))
    0.3889
    """
    sums = _columns(true_N, predicted_N, num_classes).sum(0)
    return float(_mean_f1(sums[None], num_classes)[0])


def paired_macro_f1(
    true_N: Integers,
    base_N: Integers,
    adapter_N: Integers,
    num_classes: int,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Difference:
    """Adapter minus base with its 95 % interval; examples are drawn with replacement, both sides together."""
    value = macro_f1(true_N, adapter_N, num_classes) - macro_f1(true_N, base_N, num_classes)
    if len(true_N) < MIN_EXAMPLES:
        return Difference(value=value, low=None, high=None)
    both = [_columns(true_N, side_N, num_classes) for side_N in (base_N, adapter_N)]
    sums_R = resampled_sums(np.concatenate(both, axis=1), seed, num_resamples)
    width = both[0].shape[1]
    differences_R = _mean_f1(sums_R[:, width:], num_classes) - _mean_f1(sums_R[:, :width], num_classes)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(differences_R, [tail, 1 - tail])
    return Difference(value=value, low=float(low), high=float(high))


def answered_macro_f1(
    answered: Sequence[Answered], choices: Sequence[str], seed: int
) -> tuple[tuple[float, float], Difference]:
    """Of base and adapter over answers that are choices; other references are classes too."""
    texts = list(dict.fromkeys([*choices, *(entry.reference.strip() for entry in answered)]))
    number = {text: place for place, text in enumerate(texts)}
    # An answer cut off at the limit is no choice: it is a class of its own, and never right.
    true_N, base_N, adapter_N = (
        np.array([number.get(text.strip(), len(texts)) for text in side], np.int64)
        for side in zip(*((entry.reference, entry.base, entry.adapter) for entry in answered), strict=True)
    )
    size = len(texts) + 1
    both = macro_f1(true_N, base_N, size), macro_f1(true_N, adapter_N, size)
    return both, paired_macro_f1(true_N, base_N, adapter_N, size, seed=seed)


def _columns(true_N: Integers, predicted_N: Integers, num_classes: int) -> Floats:
    """For each example a one under its class: where both agree, where predicted, where true: [N, 3 C]."""
    one_hot = np.eye(num_classes)
    hits_NC = one_hot[true_N] * (true_N == predicted_N)[:, None]
    return np.concatenate([hits_NC, one_hot[predicted_N], one_hot[true_N]], axis=1)


def _mean_f1(sums_R: Floats, num_classes: int) -> Floats:
    hits_RC, predicted_RC, true_RC = (
        sums_R[:, part * num_classes : (part + 1) * num_classes] for part in range(3)
    )
    total_RC = predicted_RC + true_RC
    f1_RC = 2 * hits_RC / np.maximum(total_RC, 1)
    with np.errstate(invalid="ignore"):
        mean_R: Floats = f1_RC.sum(1) / (total_RC > 0).sum(1)
    return mean_R
