"""Event records of made-up runs, through the real event classes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from phinetune.base import events

NUM_STEPS = 40


def stepped(step: int, loss: float, num_steps: int = NUM_STEPS) -> events.Stepped:
    return events.Stepped(
        time=1000.0 + step,
        step=step,
        num_steps=num_steps,
        epoch=step / 20,
        loss=loss,
        learning_rate=1e-3 * (1 - step / num_steps),
        grad_norm=0.5,
        num_tokens=100,
        num_trained_tokens=40,
        seconds=0.1,
    )


def evaluated(step: int, loss: float, *, is_best: bool = False) -> events.Evaluated:
    return events.Evaluated(
        time=1000.0 + step,
        step=step,
        epoch=step / 20,
        loss=loss,
        token_accuracy=0.5,
        num_trained_tokens=400,
        is_best=is_best,
        seconds=0.2,
    )


def course() -> list[events.Event]:
    """40 steps with a test every 10; the best test is at step 30."""
    found: list[events.Event] = [evaluated(0, 3.1)]
    for step in range(1, NUM_STEPS + 1):
        found.append(stepped(step, 3 * math.exp(-step / 12) + 0.15 * math.sin(step * 1.7) + 0.3))
        if step % 10 == 0:
            found.append(evaluated(step, {10: 1.6, 20: 0.9, 30: 0.21, 40: 0.25}[step], is_best=step <= 30))
    return found


def records(found: list[events.Event]) -> list[dict[str, Any]]:
    """As they come back from a file."""
    return [json.loads(json.dumps(event.record(), allow_nan=False)) for event in found]


def write_events(path: Path, found: list[events.Event]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    log = events.EventLog(path)
    for event in found:
        log.append(event)
    log.close()
    return path
