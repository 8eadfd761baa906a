"""What is known of a run from its folder, at any time: for lists, and to put runs beside each other.

Knows nothing of terminals.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phinetune.base.errors import UserError
from phinetune.reports.history import History, read_history
from phinetune.runs.folder import RunFolder

_MISSING = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One line about a run. Losses are of the test set; None where nothing was measured yet."""

    run_id: str
    path: str
    status: str
    started: float
    seconds: float
    base: str
    num_steps_done: int
    num_steps: int | None
    first_loss: float | None
    best_loss: float | None
    best_step: int | None
    goes_on_from: str


def overview(run: RunFolder) -> Overview:
    """The state of a run by its record and its events."""
    record, found, status = run.record(), _history(run), run.status()
    last = found.steps[-1] if found.steps else None
    first = next((entry.loss for entry in found.evaluations if entry.step == 0), None)
    lineage = run.lineage()
    return Overview(
        run_id=run.run_id,
        path=str(run.path),
        status=status,
        started=record["started"],
        seconds=_ended(run, record, status) - record["started"],
        base=record["base"]["name"],
        num_steps_done=last.step if last else 0,
        num_steps=last.num_steps if last else None,
        first_loss=first,
        best_loss=found.best.loss if found.best else None,
        best_step=found.best.step if found.best else None,
        goes_on_from=(lineage[-1].get("run_id") or lineage[-1]["path"]) if lineage else "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a comparison: a name and one value per run."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """Runs beside each other: what was different, and what came of it."""

    run_ids: tuple[str, ...]
    settings: tuple[Row, ...]
    results: tuple[Row, ...]
    warnings: tuple[str, ...]


def side_by_side(runs: Sequence[RunFolder]) -> SideBySide:
    """Settings, data and base that differ, and the figures of each run. Raises `UserError` below two runs."""
    if len(runs) < 2:
        raise UserError("one run cannot be compared with itself", do="name two runs or more")
    records = [run.record() for run in runs]
    names = dict.fromkeys(key for record in records for key in record["settings"])
    compared = [(name, [record["settings"].get(name, _MISSING) for record in records]) for name in names] + [
        ("base weights", [record["base"]["sha256"][:12] for record in records]),
        ("training data", [record["data"]["train"]["sha256"][:12] for record in records]),
        ("test data", [record["data"]["test"]["sha256"][:12] for record in records]),
    ]
    warnings = []
    if len({record["data"]["test"]["sha256"] for record in records}) > 1:
        warnings.append("the runs were measured on different test sets: their figures do not compare")
    return SideBySide(
        run_ids=tuple(run.run_id for run in runs),
        settings=tuple(
            Row(name=name, values=tuple(values))
            for name, values in compared
            if any(value != values[0] for value in values)
        ),
        results=tuple(_results(runs)),
        warnings=tuple(warnings),
    )


def _results(runs: Sequence[RunFolder]) -> list[Row]:
    overviews = [overview(run) for run in runs]
    summaries = [_summary(run) for run in runs]
    rows = [
        Row(name=name, values=tuple(getattr(item, name) for item in overviews))
        for name in ("status", "num_steps_done", "best_step", "first_loss", "best_loss")
    ]
    for name in ("seconds", "tokens_per_second", "peak_memory_bytes"):
        rows.append(Row(name=name, values=tuple(summary.get(name) for summary in summaries)))
    evaluations = [summary.get("evaluation", {}).get("adapter", {}) for summary in summaries]
    for metric in dict.fromkeys(metric for evaluation in evaluations for metric in evaluation):
        rows.append(Row(name=metric, values=tuple(evaluation.get(metric) for evaluation in evaluations)))
    return rows


def _summary(run: RunFolder) -> Mapping[str, Any]:
    if not run.summary.is_file():
        return {}
    content: Mapping[str, Any] = json.loads(run.summary.read_text(encoding="utf-8"))
    return content


def _history(run: RunFolder) -> History:
    return read_history(run.events) if run.events.is_file() else History(steps=(), evaluations=())


def _ended(run: RunFolder, record: Mapping[str, Any], status: str) -> float:
    """When it ended; a run that was killed has not written so itself."""
    if status == "running":
        return time.time()
    if "ended" in record:
        return float(record["ended"])
    return (run.events if run.events.is_file() else run.run_json).stat().st_mtime
