"""What `phinetune adapter` prints: tables for people, records for machines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from phinetune.cli import console
from phinetune.cli.adapter_place import is_here

if TYPE_CHECKING:
    from phinetune.lora.forms import Form
    from phinetune.lora.servability import Verdict
    from phinetune.lora.weights import AdapterWeights
    from phinetune.models.merged import MergeReport

# Above this share of the adapter's own effect rounding is worth a word.
MUCH_ROUNDED = 0.05
_COLOURS = {"as it is": "green", "with a setting": "green", "after conversion": "yellow", "no": "red"}


def adapter_record(weights: AdapterWeights, form: Form, path: Path) -> dict[str, Any]:
    """One adapter as a JSON document."""
    return {
        "path": str(path),
        "form": form,
        "base": weights.base_name,
        "rank": weights.settings.rank,
        "alpha": weights.settings.alpha,
        "use_rslora": weights.settings.use_rslora,
        "use_dora": weights.uses_dora,
        "rank_pattern": dict(weights.settings.rank_pattern),
        "alpha_pattern": dict(weights.settings.alpha_pattern),
        "num_parameters": weights.num_parameters,
        "trained_whole": sorted(weights.whole),
        "targets": [dict(zip(_COLUMNS, row, strict=True)) for row in _rows(weights)],
        "metadata": dict(weights.metadata),
    }


_COLUMNS = ("target", "layers", "in", "out", "rank", "scale", "parameters")


def _rows(weights: AdapterWeights) -> list[tuple[str | int | float, ...]]:
    """One row per target and shape, rank and scale."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for name, update in weights.updates.items():
        key = (name.rsplit(".", 1)[-1], update.in_features, update.out_features, update.rank, update.scaling)
        groups.setdefault(key, []).append(update.num_parameters)
    return [(key[0], len(sizes), *key[1:], sum(sizes)) for key, sizes in groups.items()]


def _ancestors(weights: AdapterWeights) -> list[str]:
    """The adapters this one was trained on from, oldest first; a foreign or damaged list shows none."""
    try:
        entries = json.loads(weights.metadata.get("lineage") or "[]")
        return [f"run {entry.get('run_id') or 'unknown'}: {entry['path']}" for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def show_adapter(weights: AdapterWeights, form: Form, path: Path) -> None:
    """Head lines and one table row per target."""
    settings = weights.settings
    extras = [name for name, on in (("rsLoRA", settings.use_rslora), ("DoRA", weights.uses_dora)) if on]
    console.say(
        f"adapter  {path} ({form})",
        f"base     {weights.base_name or 'not said'}",
        f"rank     {settings.rank}, alpha {settings.alpha:g}{''.join(', ' + extra for extra in extras)}",
        f"trained  {weights.num_parameters:,} parameters in {len(weights.updates)} layers",
        *([f"whole    {', '.join(sorted(weights.whole))}"] if weights.whole else []),
        *(f"before   {ancestor}" for ancestor in _ancestors(weights)),
        "",
    )
    table = Table.grid(padding=(0, 2))
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "target" else "right")
    table.add_row(*(Text(column, style="dim") for column in _COLUMNS))
    for target, layers, width, height, rank, scale, size in _rows(weights):
        figures = (f"{layers}", f"{width:,}", f"{height:,}", f"{rank}", f"{scale:g}", f"{size:,}")
        table.add_row(str(target), *figures)
    console.say(table)


def merge_record(report: MergeReport) -> dict[str, Any]:
    """A merge as a JSON document."""
    record = dataclasses.asdict(report)
    return {**record, "folder": str(report.folder), "weight_change": dict(report.weight_change)}


def show_merge(report: MergeReport) -> None:
    """Where the model is, and what changed."""
    console.say(f"model    {report.folder}", f"layers   {report.num_layers}", "")
    grid = Table.grid(padding=(0, 2))
    for target, change in report.weight_change.items():
        grid.add_row(f"greatest change of a weight in {target}", f"{change:.3g}")
    grid.add_row("greatest rounding of a written weight", f"{report.rounding:.3g}")
    grid.add_row("greatest change of a logit", f"{report.logit_change:.3g}")
    if report.logit_error is not None:
        grid.add_row("greatest difference from base and adapter side by side", f"{report.logit_error:.3g}")
    if report.base_difference is not None:
        grid.add_row("greatest difference of a weight from the base's", _distance(report))
    console.say(grid)
    lost = report.logit_error / report.logit_change if report.logit_error and report.logit_change else 0.0
    if lost > MUCH_ROUNDED:
        console.note(
            f"note     rounding to the base's type changes logits by {lost:.0%} of what the adapter does; "
            "base and adapter side by side lose nothing",
            style="yellow",
        )


def _distance(report: MergeReport) -> str:
    assert report.base_difference is not None
    if not report.is_difference_measured:
        return f"at most {report.base_difference:.3g} (the base is not here to compare)"
    return f"{report.base_difference:.3g}" if report.base_difference else "none: bit for bit"


def check_record(weights: AdapterWeights, form: Form, base: str, verdicts: list[Verdict]) -> dict[str, Any]:
    """A check as a JSON document; `base` is "" where it was not compared."""
    return {
        "is_sound": True,
        "form": form,
        "fits_base": base or None,
        "num_layers": len(weights.updates),
        "engines": [dataclasses.asdict(verdict) for verdict in verdicts],
    }


def _fit(weights: AdapterWeights, base: str, fits: bool) -> str:
    if fits and not weights.base_sha256:
        return f"every layer fits {base}; the adapter does not say on which weights it was trained"
    if fits:
        return f"every layer fits {base}"
    if is_here(base):
        return f"the layers of {base} are fused, those of the adapter are not"
    if not base:
        return "not compared: the adapter names none (--base)"
    return f"not compared: {base} is not here (--base)"


def show_check(weights: AdapterWeights, form: Form, base: str, fits: bool, verdicts: list[Verdict]) -> None:
    """Soundness, fit, and one table row per engine."""
    console.say(f"sound    {len(weights.updates)} layers, every value finite, every shape right ({form})")
    console.say(f"base     {_fit(weights, base, fits)}")
    console.say("")
    table = Table.grid(padding=(0, 2))
    for column in ("engine", "runs", "why", "do"):
        table.add_column(column, overflow="fold", no_wrap=column in ("engine", "runs"))
    table.add_row(*(Text(column, style="dim") for column in ("engine", "runs", "why", "do")))
    for verdict in verdicts:
        runs = Text(verdict.answer, style=_COLOURS[verdict.answer])
        table.add_row(verdict.engine, runs, verdict.why, verdict.do)
    console.say(table)
