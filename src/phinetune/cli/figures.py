"""Numbers as people read them: metrics, differences with their interval, sizes and times.

Knows nothing of consoles: values in, text out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phinetune.evaluation.metrics import LOWER_IS_BETTER

NAMES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "json_valid": "valid JSON",
    "macro_f1": "macro-F1",
}
# Where fewer answers than this are exactly right on both sides, exact match says nothing about the task.
MIN_EXACT_MATCH = 0.05


def metric_name(metric: str) -> str:
    """The name to show.

    >>> metric_name("field:category")
    'field category'
    """
    return NAMES.get(metric, metric.replace(":", " ").replace("_", " "))


def is_share(metric: str) -> bool:
    """Whether the metric is a share of 1, shown in percent."""
    return metric not in LOWER_IS_BETTER


def value_text(metric: str, value: float | None) -> str:
    """One figure.

    >>> value_text("exact_match", 0.915), value_text("loss", 0.41234), value_text("perplexity", 1234.5)
    ('91.5 %', '0.412', '1,234')
    """
    if value is None or not math.isfinite(value):
        return "-"
    if is_share(metric):
        return f"{100 * value:.1f} %"
    return f"{value:,.{_digits(metric, value)}f}"


def difference_text(metric: str, difference: Mapping[str, Any]) -> str:
    """Adapter minus base with its 95 % interval; shares in percentage points.

    >>> difference_text("exact_match", {"value": 0.9, "low": 0.855, "high": 0.94})
    '+90.0 [+85.5, +94.0]'
    """
    scale = 100.0 if is_share(metric) else 1.0
    numbers = [difference.get(key) for key in ("value", "low", "high")]
    digits = min(_digits(metric, number) for number in numbers)
    value, low, high = ("" if n is None else f"{scale * n:+,.{digits}f}" for n in numbers)
    return f"{value} [{low}, {high}]" if low and high else value or "-"


def _digits(metric: str, value: float | None) -> int:
    """Decimals worth showing."""
    if is_share(metric):
        return 1
    return 3 if value is None or abs(value) < 10 else 2 if abs(value) < 100 else 0


def verdict(metric: str, difference: Mapping[str, Any]) -> str:
    """What the interval says in plain words: better, worse, not clear, or no interval.

    >>> verdict("loss", {"value": -0.5, "low": -0.6, "high": -0.4})
    'better'
    >>> verdict("exact_match", {"value": 0.01, "low": -0.02, "high": 0.04})
    'no clear change'
    """
    low, high = difference.get("low"), difference.get("high")
    if low is None or high is None:
        return "too few to tell"
    if low <= 0 <= high:
        return "no clear change"
    return "better" if (high < 0) == (metric in LOWER_IS_BETTER) else "worse"


def headline(evaluation: Mapping[str, Any]) -> str:
    """The result in one sentence: by accuracy or exact match where there is one, else by loss.

    >>> headline({"base": {"loss": 3.0}, "adapter": {"loss": 1.5},
    ...           "difference": {"loss": {"value": -1.5, "low": -1.6, "high": -1.4}}})
    'loss: base 3.000, adapter 1.500: better (95 % interval of the difference: -1.500 [-1.600, -1.400])'
    """
    exact = [evaluation[side].get("exact_match") or 0.0 for side in ("base", "adapter")]
    metric = "exact_match" if max(exact) >= MIN_EXACT_MATCH else "loss"
    if "accuracy" in evaluation["difference"]:
        metric = "accuracy"
    difference = evaluation["difference"].get(metric)
    if difference is None:
        return ""
    base, adapter = (value_text(metric, evaluation[side].get(metric)) for side in ("base", "adapter"))
    figures = f"{metric_name(metric)}: base {base}, adapter {adapter}"
    if difference.get("low") is None:
        return f"{figures}: too few test examples to tell whether that is chance"
    interval = difference_text(metric, difference)
    return f"{figures}: {verdict(metric, difference)} (95 % interval of the difference: {interval})"


def duration_text(seconds: float | None) -> str:
    """A time span.

    >>> duration_text(42.4), duration_text(150), duration_text(7300)
    ('42 s', '2 min 30 s', '2 h 1 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size_text(size_bytes: float | None) -> str:
    """A size.

    >>> size_text(1_500_000), size_text(3.2e9)
    ('1.5 MB', '3.2 GB')
    """
    if size_bytes is None:
        return "unknown"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def count(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count(1, "step"), count(2048, "example")
    ('1 step', '2,048 examples')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
