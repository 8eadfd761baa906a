"""The plan of a run as a table, before any time is spent.

Knows nothing of how the plan was made: `training.plan.Plan` as plain values, plus the forecast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phinetune.cli.figures import count, duration_text, size_text

NUM_CLASSES_SHOWN = 6


def plan_view(plan: Mapping[str, Any]) -> RenderableType:
    """Data, steps, evaluations, forecast and warnings, one line each."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in plan_rows(plan):
        grid.add_row(name, text)
    return Group("", Text("plan", style="bold"), grid, "")


def plan_rows(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each line of the plan."""
    for part in ("train", "test"):
        yield part, _set_text(plan[part])
    if classes := plan.get("classes"):
        shown = ", ".join(classes[:NUM_CLASSES_SHOWN])
        yield "classes", f"{len(classes):,}: {shown}{', …' if len(classes) > NUM_CLASSES_SHOWN else ''}"
    num_steps = plan["num_steps"]
    steps = count(num_steps, "step")
    yield "steps", f"{steps}, {plan['steps_per_epoch']:,} per epoch"
    if plan["warmup_share"]:
        yield "warm-up", f"{plan['warmup_share']:.0%} of the steps"
    beginning = plan.get("from_adapter")
    before = "that adapter" if beginning else "the base"
    yield "evaluations", f"{len(plan['evaluation_steps'])} of the test loss, and {before} before"
    if beginning:
        yield "begins", f"with the adapter {beginning}"
    if batches := plan.get("batches"):
        yield "auto", ", ".join(f"{name}: {number}" for name, number in batches.items())
    if coverage := plan.get("coverage"):
        method = plan.get("method")
        yield "adapter", _coverage_text(coverage) + (f"; {method}" if method else "")
    if compute := plan.get("compute"):
        yield "compute", str(compute)
    if forecast := plan.get("forecast"):
        yield "forecast", _forecast_text(forecast)


def _set_text(data: Mapping[str, Any]) -> str:
    parts = [
        count(data["num_used"], "example"),
        count(data["num_sequences"], "packed sequence"),
        count(data["num_tokens"], "token"),
        f"{data['num_trained_tokens']:,} of them trained",
    ]
    for key, word in (("num_cut", "cut"), ("num_dropped", "left out"), ("num_split", "split")):
        if data.get(key):
            parts.append(f"{data[key]:,} {word}")
    return ", ".join(parts)


def _forecast_text(forecast: Mapping[str, Any]) -> str:
    whole = duration_text(forecast.get("total_seconds", forecast["seconds"]))
    compared = forecast.get("comparison_seconds", 0.0)
    parts = f" ({duration_text(compared)} of it for the comparison)" if compared >= 1 else ""
    return f"about {whole}{parts}, {size_text(forecast['peak_memory_bytes'])} of memory"


def _coverage_text(coverage: list[Mapping[str, Any]]) -> str:
    kinds = {"rows": " rows of", "module": " whole"}
    layers = ", ".join(
        f"{row['num_layers']}{kinds.get(row.get('kind', ''), '')} {row['target']}" for row in coverage
    )
    return f"{sum(row['num_parameters'] for row in coverage):,} weights in {layers}"


def warnings_of(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the plan warns of, each with the proposed lines of lora.yaml."""
    return [(warning["what"], warning.get("propose", "")) for warning in plan.get("warnings", ())]
