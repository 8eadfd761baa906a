"""What happens during a run, as typed events, and the JSON Lines file that keeps them.

Events carry plain numbers and text only: the terminal, the page and the plots read the same file.
Knows nothing of tensors or of who listens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phinetune.base.errors import SpaceError, UserError
from phinetune.base.files import full_disk_said
from phinetune.base.locks import try_lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events; `kind` in the file is the class name."""

    time: float = field(default_factory=time.time)

    def record(self) -> dict[str, Any]:
        """The event as JSON: kind first; a number that is not finite becomes null."""
        return {"event": type(self).__name__, **_plain(dataclasses.asdict(self))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Event):
    """A part of the run begins: reading, rendering, loading, training, comparing."""

    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something the user should know; `propose` is what to change, ready to be copied."""

    what: str
    propose: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted(Event):
    """How a figure came about; no reason to change anything."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """The plan before any time is spent; `plan` is `training.plan.Plan` as plain values."""

    plan: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped(Event):
    """One optimizer step: mean loss per trained token before the update."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_trained_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """Loss and token accuracy over the whole test set at one step.

    Step 0 is before training: the base model, or the adapter that the run goes on from.
    """

    step: int
    epoch: float
    loss: float
    token_accuracy: float
    num_trained_tokens: int
    is_best: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveDue(Event):
    """The loop asks its caller to write a checkpoint now; it writes no files itself."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(Event):
    """A checkpoint is on disk."""

    step: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """An interrupted run goes on after this step, from the checkpoint at `path` ("" for step 0)."""

    step: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused(Event):
    """The run waits for room on the disk, and tries again every few seconds."""

    what: str
    needed_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """The run ended early because it was asked to; `path` is what was saved last ("" for nothing)."""

    step: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reforecast(Event):
    """The run's time from training to comparison, forecast again from the pace of its first steps.

    `seconds` counts from the beginning of the training, `seconds_left` from this step.
    """

    step: int
    seconds: float
    seconds_left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(Event):
    """The training loop ended; the best adapter is in the model."""

    stopped_because: str
    num_steps: int
    best_step: int
    seconds: float
    num_tokens: int
    num_trained_tokens: int
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared(Event):
    """Base and adapter on the test set; `evaluation` and `answers` as in summary.json."""

    evaluation: dict[str, Any]
    answers: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The run is complete; `summary` is the content of summary.json."""

    summary: dict[str, Any]


class EventLog:
    """Append events to a JSON Lines file, each line whole. One writer at a time holds the file's lock.

    A last line that a crash cut off is taken away first: it would swallow the next one. While the disk
    is full, lines wait in memory. Raises `UserError` when another process writes the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()
        if not try_lock(self._file.fileno()):
            self._file.close()
            raise UserError(
                "the run is being written by another process",
                where=str(path.parent),
                do="wait until it has ended, or end it",
            )
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)

    def append(self, event: Event) -> None:
        line = json.dumps(event.record(), ensure_ascii=False, allow_nan=False) + "\n"
        self._waiting += line.encode()
        with contextlib.suppress(SpaceError):
            self._write()

    def sync(self) -> None:
        """Push all lines to the disk. Raises `SpaceError` when it is full; the lines then wait."""
        with full_disk_said(self._path):
            self._write()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(SpaceError):
            self._write()
        self._file.close()

    def _write(self) -> None:
        with full_disk_said(self._path):
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]


def is_being_written(path: Path) -> bool:
    """Whether a living process holds the event file of a run."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return not try_lock(file.fileno())


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The records of an event file; a last line cut by a crash is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def event_of(record: Mapping[str, Any]) -> Event | None:
    """The event of a record; None when its kind, or what it must hold, is not known here.

    >>> event_of({"event": "Noted", "time": 1.0, "what": "hello", "added": "later"})
    Noted(time=1.0, what='hello')
    """
    kinds = {kind.__name__: kind for kind in Event.__subclasses__()}
    kind = kinds.get(str(record.get("event")))
    if kind is None:
        return None
    values = {}
    for entry in dataclasses.fields(kind):
        if entry.name in record:
            value = record[entry.name]
            # A number that was not finite was written as null.
            values[entry.name] = math.nan if value is None and entry.type == "float" else value
    try:
        return kind(**values)
    except TypeError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
