"""Macro-F1 is the mean of the classes' F1, and its interval is that of drawing examples again."""

from __future__ import annotations

import numpy as np
import pytest

from phinetune.evaluation.macro_f1 import macro_f1, paired_macro_f1


def by_hand(true, predicted, num_classes):
    scores = []
    for name in range(num_classes):
        hits = sum(t == p == name for t, p in zip(true, predicted, strict=True))
        total = sum(t == name for t in true) + sum(p == name for p in predicted)
        if total:
            scores.append(2 * hits / total)
    return sum(scores) / len(scores)


def drawn(num=60, classes=5, seed=0, share_right=0.6):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, num)
    predicted = np.where(rng.random(num) < share_right, true, rng.integers(0, classes, num))
    return true, predicted


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 5, 90])
def test_it_is_the_mean_over_the_classes_that_occur(seed, classes):
    true, predicted = drawn(classes=classes, seed=seed)
    assert macro_f1(true, predicted, classes) == pytest.approx(by_hand(true, predicted, classes))


def test_all_right_is_1_and_one_class_alone_is_little():
    true = np.array([0, 1, 2] * 10)
    assert macro_f1(true, true, 3) == 1
    assert macro_f1(true, np.zeros_like(true), 3) == pytest.approx(0.5 / 3)


def test_the_interval_is_that_of_resampling_by_hand():
    true, base = drawn(seed=1, share_right=0.3)
    _, adapter = drawn(seed=1, share_right=0.8)
    found = paired_macro_f1(true, base, adapter, 5, seed=7, num_resamples=400)
    assert found.value == pytest.approx(by_hand(true, adapter, 5) - by_hand(true, base, 5))
    rng = np.random.default_rng(11)
    differences = []
    for _ in range(400):
        places = rng.integers(0, len(true), len(true))
        one, two, three = true[places], base[places], adapter[places]
        differences.append(by_hand(one, three, 5) - by_hand(one, two, 5))
    low, high = np.quantile(differences, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.04)
    assert found.high == pytest.approx(high, abs=0.04)
    assert found == paired_macro_f1(true, base, adapter, 5, seed=7, num_resamples=400)


def test_few_examples_have_no_interval():
    true = np.array([0, 1, 1])
    found = paired_macro_f1(true, true, true, 2, seed=0)
    assert (found.value, found.low, found.high) == (0, None, None)
