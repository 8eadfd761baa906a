"""The interval holds the truth as often as it says, and identical systems never differ."""

from __future__ import annotations

import time

import numpy as np
import pytest

from phinetune.evaluation.bootstrap import (
    MIN_EXAMPLES,
    Difference,
    PairedMeasure,
    paired_bootstrap,
    reading,
    totals,
)


def measure(base, adapter, weight=None, *, is_exponential=False) -> PairedMeasure:
    base_N = np.asarray(base, dtype=np.float64)
    weight_N = np.ones_like(base_N) if weight is None else np.asarray(weight, dtype=np.float64)
    return PairedMeasure(
        base_N=base_N,
        adapter_N=np.asarray(adapter, dtype=np.float64),
        weight_N=weight_N,
        is_exponential=is_exponential,
    )


def token_weighted_losses(random: np.random.Generator, num: int) -> PairedMeasure:
    """Losses of examples of unequal length: base 2.0, adapter 1.9 per token on average, paired noise."""
    tokens = random.integers(5, 60, size=num)
    hardness = random.normal(0, 0.5, size=num)
    base = tokens * (2.0 + hardness + random.normal(0, 0.2, size=num))
    adapter = tokens * (1.9 + hardness + random.normal(0, 0.2, size=num))
    return measure(base, adapter, tokens)


def test_coverage_of_a_token_weighted_loss_is_near_95_percent():
    random = np.random.default_rng(1)
    hits = 0
    for trial in range(400):
        found = paired_bootstrap({"loss": token_weighted_losses(random, 80)}, seed=trial, num_resamples=1000)
        hits += found["loss"].low <= -0.1 <= found["loss"].high
    # 400 trials of a true 95 % lie within 0.95 +- 0.03 (2.8 standard deviations).
    assert 0.92 <= hits / 400 <= 0.98


def test_coverage_of_a_rate_is_near_95_percent():
    random = np.random.default_rng(2)
    hits = 0
    for trial in range(400):
        luck = random.random(120)
        base, adapter = luck < 0.4, (luck + random.normal(0, 0.2, 120)) < 0.55
        found = paired_bootstrap({"exact_match": measure(base, adapter)}, seed=trial, num_resamples=1000)
        hits += found["exact_match"].low <= TRUE_RATE_DIFFERENCE <= found["exact_match"].high
    assert 0.915 <= hits / 400 <= 0.98


def _true_rate_difference() -> float:
    random = np.random.default_rng(3)
    luck = random.random(2_000_000)
    return float(((luck + random.normal(0, 0.2, 2_000_000)) < 0.55).mean() - 0.4)


TRUE_RATE_DIFFERENCE = _true_rate_difference()


def test_pairing_makes_the_interval_narrow():
    random = np.random.default_rng(4)
    paired = token_weighted_losses(random, 100)
    order = random.permutation(100)
    # Tokens equal for all, so that a shuffle changes nothing but the pairing.
    base, adapter = paired.base_N / paired.weight_N, paired.adapter_N / paired.weight_N
    widths = []
    for shuffled in (adapter, adapter[order]):
        found = paired_bootstrap({"loss": measure(base, shuffled)}, seed=0)["loss"]
        widths.append(found.high - found.low)
    assert widths[0] < 0.6 * widths[1]


def test_identical_systems_differ_by_exactly_nothing():
    losses = token_weighted_losses(np.random.default_rng(5), 50)
    same = measure(losses.base_N, losses.base_N, losses.weight_N)
    perplexities = measure(losses.base_N, losses.base_N, losses.weight_N, is_exponential=True)
    for found in paired_bootstrap({"loss": same, "perplexity": perplexities}, seed=0).values():
        assert found == Difference(value=0.0, low=0.0, high=0.0)
        assert reading("loss", found) == "no clear difference"


def test_value_is_a_ratio_of_sums_not_a_mean_of_ratios():
    weighted = measure([10.0, 1.0] * 5, [10.0, 0.0] * 5, [100, 1] * 5)
    assert totals(weighted) == pytest.approx((55 / 505, 50 / 505))
    assert paired_bootstrap({"loss": weighted}, seed=0)["loss"].value == pytest.approx(-5 / 505)


def test_perplexity_is_the_exponential_of_the_resampled_loss():
    losses = token_weighted_losses(np.random.default_rng(6), 40)
    exponential = measure(losses.base_N, losses.adapter_N, losses.weight_N, is_exponential=True)
    base, adapter = totals(losses)
    assert totals(exponential) == pytest.approx((np.exp(base), np.exp(adapter)))
    found = paired_bootstrap({"perplexity": exponential}, seed=0)["perplexity"]
    assert found.low < np.exp(adapter) - np.exp(base) < found.high


def test_same_seed_same_interval_and_chunks_do_not_matter(monkeypatch):
    losses = {"loss": token_weighted_losses(np.random.default_rng(7), 60)}
    first = paired_bootstrap(losses, seed=3)
    assert paired_bootstrap(losses, seed=3) == first
    assert paired_bootstrap(losses, seed=4) != first
    monkeypatch.setattr("phinetune.evaluation.bootstrap._MAX_COUNTS", 600)
    in_chunks = paired_bootstrap(losses, seed=3)["loss"]
    assert in_chunks.low == pytest.approx(first["loss"].low, abs=1e-12)


def test_too_few_examples_get_no_interval():
    few = measure(
        [1.0] * (MIN_EXAMPLES - 1) + [0.0], [0.0] * MIN_EXAMPLES, [1.0] * (MIN_EXAMPLES - 1) + [0.0]
    )
    found = paired_bootstrap({"field:name": few}, seed=0)["field:name"]
    assert found == Difference(value=-1.0, low=None, high=None)
    assert reading("field:name", found) == "too few examples"


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        ("loss", -2.0, -1.0, "better"),
        ("loss", 1.0, 2.0, "worse"),
        ("perplexity", -2.0, -1.0, "better"),
        ("exact_match", -2.0, -1.0, "worse"),
        ("field:name", 1.0, 2.0, "better"),
        ("exact_match", 0.0, 2.0, "no clear difference"),
        ("loss", -0.1, 0.1, "no clear difference"),
    ],
)
def test_reading_knows_which_way_is_better(metric, low, high, expected):
    assert reading(metric, Difference(value=(low + high) / 2, low=low, high=high)) == expected


def test_ten_thousand_examples_take_under_ten_seconds():
    losses = token_weighted_losses(np.random.default_rng(8), 10_000)
    start = time.perf_counter()
    paired_bootstrap({f"metric {index}": losses for index in range(8)}, seed=0)
    assert time.perf_counter() - start < 10
