"""Where everything of a run stands on disk, and how runs are named.

    runs/20261120-142233-k3f/
        run.json  events.jsonl  trainer_state.json  summary.json  report.html
        checkpoints/step-000064/  checkpoints/best/  adapter/  plots/
        start/  (the adapter it goes on from, where there is one)

Knows nothing of training.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.base.errors import UserError
from phinetune.base.events import is_being_written
from phinetune.base.files import committed_dir, write_atomically

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NUM_CHECKPOINTS_KEPT = 2


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def trainer_state(self) -> Path:
        return self.path / "trainer_state.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def loss_plot(self) -> Path:
        return self.path / "plots" / "loss.svg"

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        content: dict[str, Any] = json.loads(self.run_json.read_text(encoding="utf-8"))
        return content

    def lineage(self) -> list[dict[str, str]]:
        """The adapters this run goes back to, oldest first; empty when it began with fresh weights."""
        found: list[dict[str, str]] = self.record().get("lineage") or []
        return found

    def status(self) -> str:
        """`running` only while a process writes the run; one that died without a word is `interrupted`."""
        status = str(self.record()["status"])
        if status == "running" and not is_being_written(self.events):
            return "interrupted"
        return status


def new_run_name() -> str:
    """Sorts by time; three characters keep runs of one second apart."""
    letters = "abcdefghijkmnpqrstuvwxyz23456789"
    return time.strftime("%Y%m%d-%H%M%S-") + "".join(secrets.choice(letters) for _ in range(3))


def checked_run_path(project: Path, name: str | None) -> Path:
    """The path of a run that does not exist yet. Raises `UserError` for a bad or taken name."""
    if name is not None and not _NAME.fullmatch(name):
        raise UserError(
            f"'{name}' cannot be the name of a run",
            where="--run",
            do="use letters, digits, '.', '_' and '-', at most 64",
        )
    path = project / "runs" / (name or new_run_name())
    if path.exists():
        raise UserError(
            f"there is a run named '{path.name}' already",
            where=str(path),
            do="choose another name, or leave --run out",
        )
    return path


def create_run(path: Path, run_json: dict[str, Any]) -> RunFolder:
    """Make the folder with its `run.json` in one step: a run folder is never half made."""
    with committed_dir(path, has_manifest=False) as temporary:
        (temporary / "plots").mkdir()
        text = json.dumps(run_json, indent=2, ensure_ascii=False, allow_nan=False)
        (temporary / "run.json").write_text(text + "\n", encoding="utf-8")
    return RunFolder(path)


def find_run(place: Path) -> RunFolder:
    """The run a path means: a run folder, its adapter, or a project (then the newest run).

    Raises `UserError` when there is none.
    """
    for candidate in (place, place.parent):
        if (candidate / "run.json").is_file():
            return RunFolder(candidate.resolve())
    if runs := runs_newest_first(place):
        return RunFolder(runs[0].path.resolve())
    raise UserError(
        "there is no run here",
        where=str(place),
        why="neither run.json nor runs/ is in it",
        do="name a run folder, or a project that has been trained",
    )


def runs_newest_first(project: Path) -> list[RunFolder]:
    """The runs of a project by when they began."""
    found = [RunFolder(path.parent) for path in (project / "runs").glob("*/run.json")]
    return sorted(found, key=_started, reverse=True)


def _started(run: RunFolder) -> tuple[float, str]:
    """When a run began, by its record; a run may have any name."""
    return float(run.record().get("started", 0.0)), run.run_id
