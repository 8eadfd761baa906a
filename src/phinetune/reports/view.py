"""Gather what a report page shows from the files of a run folder, as plain text in rows.

A part that the run has not come to yet is empty. Knows nothing of HTML.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.base.errors import UserError
from phinetune.base.events import read_events
from phinetune.reports import wording

FILES = {
    "adapter": "the adapter: a PEFT folder, the result",
    "summary.json": "the result in numbers",
    "run.json": "settings, hashes, versions, machine",
    "events.jsonl": "every step, evaluation and warning",
    "trainer_state.json": "the course in the Hugging Face form",
    "plots/loss.svg": "the plot above",
    "checkpoints": "the last checkpoints and the best one",
}
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One measure of base and adapter."""

    name: str
    meaning: str
    base: str
    adapter: str
    difference: str
    interval: str
    reading: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRow:
    """One prompt with its reference and both answers."""

    prompt: str
    reference: str
    base: str
    adapter: str
    base_matches: bool
    adapter_matches: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PageView:
    """Everything on the page."""

    run_id: str
    reading: str
    headline: str
    facts: Pairs
    metrics: tuple[MetricRow, ...]
    answers: tuple[AnswerRow, ...]
    data: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...]
    settings: Pairs
    machine: Pairs
    files: tuple[tuple[str, str, str], ...]
    python_base: str


def page_view(run_folder: Path) -> PageView:
    """Read a run folder. Raises `UserError` when it holds no run or a file of it is damaged."""
    run, summary = _json(run_folder / "run.json"), _json(run_folder / "summary.json")
    events_path = run_folder / "events.jsonl"
    if not run and not events_path.is_file():
        raise UserError("there is no run here", where=str(run_folder), do="name a folder that holds run.json")
    records = list(read_events(events_path)) if events_path.is_file() else []
    compared = _last(records, "Compared")
    evaluation = summary.get("evaluation") or compared.get("evaluation")
    reading: str
    if evaluation and "loss" in evaluation["difference"]:
        reading, headline = wording.verdict(evaluation)
    else:
        status = summary.get("status") or run.get("status") or "unknown"
        reading, headline = "unfinished", f"Base and adapter have not been compared yet (status: {status})."
    planned = _last(records, "Planned")
    settings = _mapping(run.get("settings"))
    return PageView(
        run_id=summary.get("run_id") or run.get("run_id") or run_folder.absolute().name,
        reading=reading,
        headline=headline,
        facts=tuple(_facts(run, summary)),
        metrics=tuple(_metric_rows(evaluation)) if evaluation else (),
        answers=tuple(map(_answer_row, compared.get("answers", []))),
        data=tuple(_data_rows(_mapping(summary.get("data") or run.get("data")))),
        warnings=tuple(summary.get("warnings") or _warnings(records, planned)),
        settings=tuple(_flat(settings)),
        machine=tuple(_flat(_mapping(run.get("machine")))),
        files=tuple(_file_rows(run_folder)),
        python_base=_python_base(_mapping(summary.get("base") or run.get("base"))),
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one when there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError("a file of the run is damaged", where=str(path), why=str(error)) from None
    return _mapping(content)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _last(records: Iterable[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    found: Mapping[str, Any] = {}
    for record in records:
        if record["event"] == kind:
            found = record
    return dict(found)


def _facts(run: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    base, adapter = _mapping(summary.get("base") or run.get("base")), _mapping(summary.get("adapter"))
    if base:
        parts = [
            str(base.get("name", "")),
            f"{base['parameters']:,} parameters" if "parameters" in base else "",
        ]
        yield "base", ", ".join(part for part in (*parts, str(base.get("dtype", ""))) if part)
        yield "base sha256", str(base.get("sha256", ""))
    if adapter:
        targets = ", ".join(map(str, adapter.get("target_modules") or ()))
        yield (
            "adapter",
            f"rank {adapter.get('rank')} on {targets}; {adapter.get('parameters', 0):,} parameters",
        )
    for ancestor in run.get("lineage") or ():
        yield "goes on from", f"run {ancestor.get('run_id') or 'unknown'}, {ancestor.get('path', '')}"
    if "steps" in summary:
        yield "steps", f"{summary['steps']:,}; best at step {summary.get('best_step')}"
    if summary.get("stopped_because"):
        yield "ended because", str(summary["stopped_because"])
    forecast = _mapping(summary.get("forecast"))
    if summary.get("seconds") is not None:
        yield (
            "training time",
            _with_forecast(wording.duration_text, summary["seconds"], forecast.get("seconds")),
        )
    if summary.get("tokens_per_second"):
        yield "speed", f"{summary['tokens_per_second']:,.0f} tokens per second"
    if summary.get("peak_memory_bytes"):
        yield (
            "peak memory",
            _with_forecast(
                wording.size_text, summary["peak_memory_bytes"], forecast.get("peak_memory_bytes")
            ),
        )
    if run.get("started"):
        yield "begun", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run["started"]))


def _with_forecast(text: Callable[[float], str], value: float, expected: float | None) -> str:
    return text(value) + (f" (forecast {text(expected)})" if expected is not None else "")


def _metric_rows(evaluation: Mapping[str, Any]) -> Iterable[MetricRow]:
    for metric, difference in evaluation["difference"].items():
        yield MetricRow(
            name=wording.metric_name(metric),
            meaning=wording.metric_meaning(metric),
            base=wording.value_text(metric, evaluation["base"].get(metric)),
            adapter=wording.value_text(metric, evaluation["adapter"].get(metric)),
            difference=wording.change_text(metric, difference.get("value")),
            interval=wording.interval_text(metric, difference),
            reading=wording.reading_of(metric, difference),
        )


def _answer_row(answer: Mapping[str, Any]) -> AnswerRow:
    prompt, reference, base, adapter = (
        str(answer.get(name, "")) for name in ("prompt", "reference", "base", "adapter")
    )
    return AnswerRow(
        prompt=prompt,
        reference=reference,
        base=base,
        adapter=adapter,
        base_matches=base.strip() == reference.strip(),
        adapter_matches=adapter.strip() == reference.strip(),
    )


def _data_rows(data: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for name in ("train", "test"):
        if part := _mapping(data.get(name)):
            numbers = (part.get(key) for key in ("examples", "tokens", "trained_tokens"))
            texts = (wording.MISSING if number is None else f"{number:,}" for number in numbers)
            yield (name, str(part.get("path", "")), *texts, str(part.get("sha256", "")))


def _warnings(records: Iterable[Mapping[str, Any]], planned: Mapping[str, Any]) -> Iterable[str]:
    """The warnings so far, of a run that has no summary yet."""
    yield from (str(entry["what"]) for entry in _mapping(planned.get("plan")).get("warnings", ()))
    yield from (str(record["what"]) for record in records if record["event"] in ("Warned", "Noted"))


def _python_base(base: Mapping[str, Any]) -> str:
    """The base's name as a Python literal, or "" where transformers could not load it by name."""
    name = base.get("name")
    return repr(str(name)) if name and name != "demo" else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested values as `outer.inner` lines."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        elif key.endswith("_bytes") and isinstance(value, int):
            yield f"{prefix}{key.removesuffix('_bytes')}", wording.size_text(value)
        else:
            yield f"{prefix}{key}", wording.MISSING if value is None else str(value)


def _file_rows(folder: Path) -> Iterable[tuple[str, str, str]]:
    for name, meaning in FILES.items():
        path = folder / name
        if path.is_file():
            yield name, wording.size_text(path.stat().st_size), meaning
        elif path.is_dir():
            sizes = (entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
            yield f"{name}/", wording.size_text(sum(sizes)), meaning
