"""Numbers are shown as they are, and judged by their interval alone."""

from __future__ import annotations

import pytest

from phinetune.cli.figures import difference_text, duration_text, headline, value_text, verdict


@pytest.mark.parametrize(
    ("metric", "low", "high", "word"),
    [
        ("loss", -0.2, -0.1, "better"),
        ("loss", 0.1, 0.2, "worse"),
        ("perplexity", -0.1, 0.1, "no clear change"),
        ("exact_match", 0.1, 0.2, "better"),
        ("field:order", -0.2, -0.1, "worse"),
        ("exact_match", 0.0, 0.2, "no clear change"),
        ("exact_match", None, None, "too few to tell"),
    ],
)
def test_the_interval_decides(metric: str, low: float | None, high: float | None, word: str) -> None:
    assert verdict(metric, {"value": 0.0, "low": low, "high": high}) == word


def test_a_difference_without_interval_has_no_brackets() -> None:
    assert difference_text("loss", {"value": -0.5, "low": None, "high": None}) == "-0.500"


def test_figures_that_are_not_finite_are_not_invented() -> None:
    assert value_text("perplexity", None) == "-"
    assert value_text("perplexity", float("inf")) == "-"
    assert duration_text(float("nan")) == "unknown"


def evaluation(base_exact: float, adapter_exact: float) -> dict[str, dict[str, object]]:
    interval = {"value": 0.1, "low": 0.05, "high": 0.2}
    return {
        "base": {"loss": 2.0, "exact_match": base_exact},
        "adapter": {"loss": 2.1, "exact_match": adapter_exact},
        "difference": {"loss": interval, "exact_match": interval},
    }


def test_the_headline_is_exact_match_where_answers_can_match() -> None:
    assert headline(evaluation(0.0, 0.9)).startswith("exact match: base 0.0 %, adapter 90.0 %: better")


def test_a_headline_without_interval_says_so() -> None:
    figures = evaluation(0.0, 0.9)
    figures["difference"]["exact_match"] = {"value": 0.9, "low": None, "high": None}
    assert headline(figures).endswith("too few test examples to tell whether that is chance")


def test_the_headline_is_the_loss_where_they_cannot_even_if_it_is_worse() -> None:
    assert headline(evaluation(0.0, 0.01)).startswith("loss: base 2.000, adapter 2.100: worse")
