"""Find the run to go on with, refuse when something has changed since, and bring its state back.

Knows nothing of how training goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.base.errors import UserError
from phinetune.base.events import Event, Noted, Resumed, Warned, read_events
from phinetune.base.files import clear_leftovers
from phinetune.models.loading import Base
from phinetune.runs.folder import RunFolder, runs_newest_first
from phinetune.runs.record import DataFile, package_versions
from phinetune.training.checkpoint import Origin, load_checkpoint, newest_valid, steps_newest_first
from phinetune.training.settings import TrainingSettings
from phinetune.training.state import TrainState

_RESUMABLE = ("interrupted", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A run to go on with; `summary` is there when it turns out to be finished."""

    run: RunFolder
    record: dict[str, Any]
    summary: dict[str, Any] | None = None

    @property
    def overrides(self) -> dict[str, str]:
        return dict(self.record.get("overrides") or {})


def find_unfinished(project: Path, run_name: str | None) -> Unfinished:
    """The named run, or the newest that was interrupted or failed; else the newest if it is finished.

    Raises `UserError` when there is none, or when the named one cannot go on.
    """
    runs = runs_newest_first(project)
    if run_name is not None:
        runs = [run for run in runs if run.run_id == run_name]
    if not runs:
        raise UserError(
            f"there is no run '{run_name}' to resume" if run_name else "there is no run to resume",
            where=str(project / "runs"),
            do="start one: leave --resume out",
        )
    for run in runs:
        if run.status() in _RESUMABLE:
            return Unfinished(run=run, record=run.record())
    run = runs[0]
    if run.status() == "succeeded":
        summary = json.loads(run.summary.read_text(encoding="utf-8"))
        return Unfinished(run=run, record=run.record(), summary=summary)
    if run.status() == "diverged":
        raise UserError(
            f"run '{run.run_id}' diverged; going on would end the same way",
            where=str(run.path),
            do="start a new run with a lower learning_rate, or with retry_on_divergence: true",
        )
    raise UserError(
        f"run '{run.run_id}' is still running",
        where=str(run.path),
        why="another process writes its events",
        do="wait until it has ended, or end it",
    )


def unfinished_note(project: Path) -> Iterator[Noted]:
    """A word about the newest run, when it was interrupted and left a checkpoint."""
    for run in runs_newest_first(project)[:1]:
        steps = steps_newest_first(run.checkpoints)
        if steps and run.status() in _RESUMABLE:
            yield Noted(
                what=f"run '{run.run_id}' ended early at {steps[0].name}; this is a new run. "
                f"To go on with the other one: phinetune train {project} --resume"
            )


def refuse_changes(
    unfinished: Unfinished, settings: TrainingSettings, base: Base, files: Sequence[DataFile]
) -> None:
    """Raise `UserError` naming every setting, data file and base that is not as when the run began."""
    record = unfinished.record
    before, now = record["settings"], settings.model_dump(mode="json")
    changes = [
        f"{key} was {json.dumps(before.get(key))}, now {json.dumps(now.get(key))}"
        for key in {**before, **now}
        if before.get(key, TrainingSettings.model_fields[key].default if key in now else None) != now.get(key)
    ]
    for name, file in zip(("train", "test"), files, strict=True):
        if record["data"][name]["sha256"] != file.sha256:
            changes.append(f"the {name} data has changed: {file.path}")
    if record["base"]["sha256"] != base.sha256:
        changes.append(f"the weights of the base have changed: {base.folder}")
    if record["base"]["dtype"] != base.compute.dtype_name:
        changes.append(
            f"the base's type was {record['base']['dtype']}, is {base.compute.dtype_name} on this machine"
        )
    if changes:
        raise UserError(
            f"run '{unfinished.run.run_id}' cannot go on: something has changed since",
            where=str(unfinished.run.path),
            why="; ".join(changes),
            do="put it back as it was, or start a new run: leave --resume out",
        )


def bring_back(
    run: RunFolder, state: TrainState, origin: Origin, *, num_processes: int = 1
) -> Iterator[Event]:
    """Set `state` to the newest whole checkpoint, saying which were skipped; at last `Resumed`.

    Raises `UserError` when there are checkpoints, or were, and none can be used.
    """
    for folder in (run.path, run.checkpoints):
        clear_leftovers(folder)
    pick = newest_valid(run.checkpoints, origin)
    for name, fault in pick.skipped:
        yield Warned(what=f"checkpoint {name} is skipped: {fault}")
    if pick.path is None:
        if any(record["event"] == "Saved" for record in read_events(run.events)):
            raise UserError(
                "the run has saved checkpoints, but none is there",
                where=str(run.checkpoints),
                do="restore a checkpoint from a backup, or start a new run without --resume",
            )
        yield Noted(what="the run was interrupted before its first checkpoint: training begins anew")
        yield Resumed(step=0, path="")
        return
    versions = load_checkpoint(pick.path, state)
    yield from _other_versions(versions, num_processes)
    yield Resumed(step=state.step, path=str(pick.path))


def _other_versions(saved: Mapping[str, str], num_processes: int) -> Iterator[Warned]:
    import torch

    now = {**package_versions(), "threads": str(torch.get_num_threads()), "processes": str(num_processes)}
    changed = [f"{name} {saved[name]} -> {now.get(name)}" for name in saved if saved[name] != now.get(name)]
    if changed:
        yield Warned(
            what=f"not as when the checkpoint was saved: {', '.join(changed)}; the last digits may differ "
            "from those of an unbroken run"
        )
