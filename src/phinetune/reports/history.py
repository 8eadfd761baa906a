"""What a run's event file says about its course: steps and evaluations in order, each once.

A resumed run repeats the steps after its last checkpoint; the later record of a step is the true one.
Knows nothing of drawing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.base.errors import UserError
from phinetune.base.events import read_events


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step; a number that was not finite is None."""

    step: int
    num_steps: int
    epoch: float
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """The test set at one step; step 0 is the base model."""

    step: int
    epoch: float
    loss: float | None
    token_accuracy: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The course of one run."""

    steps: tuple[StepRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]

    @property
    def best(self) -> EvaluationRecord | None:
        """The evaluation of the lowest loss after training began, the earliest when several are equal."""
        found = [entry for entry in self.evaluations if entry.step > 0 and entry.loss is not None]
        return min(found, key=lambda entry: (entry.loss, entry.step), default=None)


def read_history(path: Path) -> History:
    """The history in an event file. Raises `UserError` when there is none."""
    if not path.is_file():
        raise UserError("the run has no event file", where=str(path), do="name a run that has begun to train")
    return history(read_events(path))


def history(records: Iterable[Mapping[str, Any]]) -> History:
    """The history in the records of an event file, in file order."""
    steps: dict[int, StepRecord] = {}
    evaluations: dict[int, EvaluationRecord] = {}
    for record in records:
        if record["event"] == "Stepped":
            step = record["step"]
            if step in steps:  # going back to an earlier step undoes whatever had come after it
                steps = {number: entry for number, entry in steps.items() if number < step}
                evaluations = {number: entry for number, entry in evaluations.items() if number < step}
            steps[step] = _step(record)
        elif record["event"] == "Evaluated":
            evaluations[record["step"]] = _evaluation(record)
    return History(steps=tuple(steps.values()), evaluations=tuple(evaluations.values()))


def _step(record: Mapping[str, Any]) -> StepRecord:
    return StepRecord(
        step=record["step"],
        num_steps=record["num_steps"],
        epoch=record["epoch"],
        loss=record["loss"],
        learning_rate=record["learning_rate"],
        grad_norm=record["grad_norm"],
        num_tokens=record["num_tokens"],
    )


def _evaluation(record: Mapping[str, Any]) -> EvaluationRecord:
    return EvaluationRecord(
        step=record["step"],
        epoch=record["epoch"],
        loss=record["loss"],
        token_accuracy=record["token_accuracy"],
        seconds=record["seconds"],
    )
