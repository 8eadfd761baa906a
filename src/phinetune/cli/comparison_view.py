"""Base and adapter beside each other: the table of figures and the answers, as rich renderables.

Knows nothing of how they were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from phinetune.cli import figures

MAX_TEXT = 600
STYLES = {"better": "green", "worse": "red", "no clear change": "yellow", "too few to tell": "yellow"}


def comparison_table(evaluation: Mapping[str, Any]) -> Table:
    """One row per metric: base, adapter, difference with its 95 % interval, and what that says."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("test set", no_wrap=False, overflow="fold")
    table.add_column("base", justify="right", no_wrap=True)
    table.add_column("adapter", justify="right", no_wrap=True)
    table.add_column("difference [95 %]", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for metric, difference in evaluation["difference"].items():
        verdict = figures.verdict(metric, difference)
        table.add_row(
            figures.metric_name(metric),
            figures.value_text(metric, evaluation["base"].get(metric)),
            figures.value_text(metric, evaluation["adapter"].get(metric)),
            figures.difference_text(metric, difference),
            Text(verdict, style=STYLES[verdict]),
        )
    return table


def answers_view(
    answers: Sequence[Mapping[str, Any]], sides: Sequence[str] = ("base", "adapter")
) -> Iterator[RenderableType]:
    """One block per answer: prompt, reference, and what each side says."""
    for answer in answers:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name in ("prompt", "reference", *sides):
            if name in answer and answer[name] is not None:
                style = "green" if name in sides[1:] else ""
                grid.add_row(name, Text(shortened(prompt_text(answer[name])), style=style))
        yield grid
        yield ""


def prompt_text(prompt: Any) -> str:
    """A prompt as one text: itself, or its turns under each other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def shortened(text: str, limit: int = MAX_TEXT) -> str:
    """The text, or its beginning and how much more there is.

    >>> shortened("abcdef", 4)
    'abcd (and 2 more characters)'
    """
    text = text if text.strip() else "(nothing)"
    return text if len(text) <= limit else f"{text[:limit]} (and {len(text) - limit:,} more characters)"
