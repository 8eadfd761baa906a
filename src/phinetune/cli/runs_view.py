"""Runs as tables: a list, one run, several beside each other. Knows nothing of where they were read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from phinetune.cli import figures
from phinetune.evaluation.metrics import LOWER_IS_BETTER

if TYPE_CHECKING:
    from phinetune.runs.overview import Overview, Row, SideBySide

STYLES = {
    "succeeded": "green",
    "running": "cyan",
    "interrupted": "yellow",
    "failed": "red",
    "diverged": "red",
}
_TEXTS = {
    "num_steps_done": "steps",
    "best_step": "best step",
    "first_loss": "test loss before",
    "best_loss": "best test loss",
    "seconds": "training",
    "tokens_per_second": "tokens per second",
    "peak_memory_bytes": "peak memory",
}


def runs_table(overviews: Iterable[Overview]) -> Table:
    """One line per run."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("began", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("test loss", justify="right", no_wrap=True)
    table.add_column("best", justify="right", no_wrap=True)
    table.add_column("goes on from", overflow="fold")
    for item in overviews:
        table.add_row(
            item.run_id,
            Text(item.status, style=STYLES.get(item.status, "")),
            began(item.started),
            figures.duration_text(item.seconds),
            steps_text(item),
            figures.value_text("loss", item.first_loss),
            figures.value_text("loss", item.best_loss),
            item.goes_on_from,
        )
    return table


def run_grid(item: Overview, settings: Mapping[str, Any], lineage: Sequence[Mapping[str, str]]) -> Table:
    """One run in full; `settings` are those that differ from the default."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("run", item.path)
    grid.add_row("status", Text(item.status, style=STYLES.get(item.status, "")))
    grid.add_row("began", f"{began(item.started)}, took {figures.duration_text(item.seconds)}")
    grid.add_row("base", item.base)
    grid.add_row("steps", steps_text(item) + (f", best {item.best_step}" if item.best_step else ""))
    before, best = (figures.value_text("loss", loss) for loss in (item.first_loss, item.best_loss))
    grid.add_row("test loss", f"{before} before training, {best} at best")
    grid.add_row("settings", "\n".join(f"{key}: {setting_text(value)}" for key, value in settings.items()))
    for entry in lineage:
        grid.add_row("goes on from", f"{entry.get('run_id', '')}  {entry['path']}".strip())
    return grid


def side_by_side_table(found: SideBySide) -> Table:
    """One column per run: first what differs, then the figures, the best of each line marked."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("", style="dim", overflow="fold")
    for run_id in found.run_ids:
        table.add_column(run_id, justify="right", overflow="fold")
    for row in found.settings:
        table.add_row(row.name, *(setting_text(value) for value in row.values))
    if not found.settings:
        table.add_row("settings", *("the same" for _ in found.run_ids))
    table.add_section()
    for row in found.results:
        table.add_row(_TEXTS.get(row.name, figures.metric_name(row.name)), *_marked(row))
    return table


def _marked(row: Row) -> list[Text]:
    is_metric = row.name not in ("status", *_TEXTS) or row.name == "best_loss"
    lower = row.name in LOWER_IS_BETTER or row.name == "best_loss"
    numbers = [value for value in row.values if isinstance(value, int | float)]
    best = (min if lower else max)(numbers) if is_metric and len(set(numbers)) > 1 else None
    return [
        Text(_result_text(row.name, value), style="green" if best is not None and value == best else "")
        for value in row.values
    ]


def _result_text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    match name:
        case "status" | "best_step" | "num_steps_done":
            return str(value)
        case "seconds":
            return figures.duration_text(value)
        case "peak_memory_bytes":
            return figures.size_text(value)
        case "tokens_per_second":
            return f"{value:,.0f}"
        case "first_loss" | "best_loss":
            return figures.value_text("loss", value)
    return figures.value_text(name, value)


def setting_text(value: Any) -> str:
    """A setting as lora.yaml has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def began(started: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(started))


def steps_text(item: Overview) -> str:
    return f"{item.num_steps_done:,}" + (f"/{item.num_steps:,}" if item.num_steps else "")
