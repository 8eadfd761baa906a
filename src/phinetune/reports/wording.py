"""Figures as a page says them: metrics, differences with their interval, sizes, times, and the verdict.

Values in, text out. Knows nothing of HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phinetune.evaluation.bootstrap import Difference, Reading, reading
from phinetune.evaluation.metrics import LOWER_IS_BETTER

NAMES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "token_f1": "word overlap (F1)",
    "json_valid": "valid JSON",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
}
MEANINGS = {
    "loss": "per trained token, or per row of a classification; lower is better",
    "perplexity": "e to the loss; lower is better",
    "token_accuracy": "trained tokens guessed right",
    "exact_match": "answers equal to the reference",
    "token_f1": "words shared with the reference",
    "json_valid": "answers that are one JSON value",
    "accuracy": "rows whose class is right",
    "macro_f1": "the mean over classes, each as important as the other",
}
MINUS, MISSING = "\u2212", "\u2013"


def metric_name(metric: str) -> str:
    """The name to show.

    >>> metric_name("field:city"), metric_name("exact_match")
    ('field city', 'exact match')
    """
    return NAMES.get(metric) or metric.replace(":", " ", 1)


def metric_meaning(metric: str) -> str:
    return MEANINGS.get(metric, "answers with this field right" if metric.startswith("field:") else "")


def value_text(metric: str, value: float | None) -> str:
    """One figure; shares in percent.

    >>> value_text("loss", 0.2134), value_text("perplexity", 1234.5), value_text("token_f1", 0.5)
    ('0.213', '1,234', '50.0 %')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if metric not in LOWER_IS_BETTER:
        return f"{100 * value:.1f} %"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


def change_text(metric: str, value: float | None) -> str:
    """A signed change; shares in percentage points.

    >>> change_text("exact_match", -0.125), change_text("loss", 0.5), change_text("token_f1", 0.0)
    ('−12.5', '+0.500', '0.0')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if metric in LOWER_IS_BETTER:
        text = f"{value:+,.3f}" if abs(value) < 100 else f"{value:+,.0f}"
    else:
        text = f"{100 * value:+.1f}"
    is_nothing = not text.strip("+-0.,")
    return text.lstrip("+-") if is_nothing else text.replace("-", MINUS)


def interval_text(metric: str, difference: Mapping[str, Any]) -> str:
    """The 95 % interval of a difference.

    >>> interval_text("loss", {"value": -0.5, "low": -0.6, "high": -0.4})
    '−0.600 to −0.400'
    """
    low, high = difference.get("low"), difference.get("high")
    if low is None or high is None:
        return "too few examples for one"
    return f"{change_text(metric, low)} to {change_text(metric, high)}"


def reading_of(metric: str, difference: Mapping[str, Any]) -> Reading:
    """Better, worse, no clear difference or too few examples, from the plain values of summary.json."""
    value = difference.get("value")
    if value is None:
        return "no clear difference"
    return reading(metric, Difference(value=value, low=difference.get("low"), high=difference.get("high")))


def verdict(evaluation: Mapping[str, Any]) -> tuple[Reading, str]:
    """The result of a comparison by test loss: the reading, and a sentence.

    >>> verdict({"base": {"loss": 3.1}, "adapter": {"loss": 0.21},
    ...          "difference": {"loss": {"value": -2.89, "low": -3.0, "high": -2.8}}})[1]
    'Adapter better than base: test loss 3.100 → 0.210 (−2.890, 95 % interval −3.000 to −2.800).'
    """
    difference = evaluation["difference"]["loss"]
    found = reading_of("loss", difference)
    words = {
        "better": "Adapter better than base",
        "worse": "Adapter worse than base",
        "no clear difference": "No clear difference between adapter and base",
        "too few examples": "Too few test examples to tell adapter and base apart",
    }[found]
    base, adapter = (value_text("loss", evaluation[side].get("loss")) for side in ("base", "adapter"))
    change = change_text("loss", difference.get("value"))
    interval = "" if found == "too few examples" else f", 95 % interval {interval_text('loss', difference)}"
    return found, f"{words}: test loss {base} → {adapter} ({change}{interval})."


def duration_text(seconds: float) -> str:
    """A time span.

    >>> duration_text(4.21), duration_text(150), duration_text(7300)
    ('4.2 s', '2 min 30 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size_text(size_bytes: float) -> str:
    """A size.

    >>> size_text(950), size_text(1_500_000), size_text(3.2e9)
    ('950 B', '1.5 MB', '3.2 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} B"
