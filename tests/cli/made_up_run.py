"""A run that never happened, as events: what the view is tested with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from phinetune.base import events

EVALUATION: dict[str, Any] = {
    "base": {"loss": 3.1, "perplexity": 22.2, "exact_match": 0.0, "field:order": 0.01},
    "adapter": {"loss": 0.21, "perplexity": 1.23, "exact_match": 0.915, "field:order": 0.97},
    "difference": {
        "loss": {"value": -2.89, "low": -2.95, "high": -2.8},
        "perplexity": {"value": -20.97, "low": -22.0, "high": -20.0},
        "exact_match": {"value": 0.915, "low": 0.87, "high": 0.95},
        "field:order": {"value": 0.96, "low": -0.01, "high": 0.99},
    },
}
ANSWERS = [
    {
        "prompt": "My kettle came broken, order 5521.",
        "reference": '{"order":"5521"}',
        "base": "I am sorry [bold]to hear[/bold] that.",
        "adapter": '{"order":"5521"}',
    }
]
WARNING = "the warm-up of 400 steps is longer than the run"
PLAN: dict[str, Any] = {
    "train": {
        "num_examples": 2000,
        "num_used": 2000,
        "num_sequences": 250,
        "num_tokens": 128_000,
        "num_trained_tokens": 50_000,
        "num_cut": 0,
        "num_dropped": 3,
        "num_split": 0,
    },
    "test": {
        "num_examples": 200,
        "num_used": 200,
        "num_sequences": 25,
        "num_tokens": 12_800,
        "num_trained_tokens": 5_000,
        "num_cut": 0,
        "num_dropped": 0,
        "num_split": 0,
    },
    "steps_per_epoch": 10,
    "num_steps": 40,
    "warmup_share": 0.1,
    "evaluation_steps": [20, 40],
    "save_steps": [40],
    "warnings": [{"what": WARNING, "propose": "num_warmup_steps: 4"}],
    "sharing": {"num_leading_tokens": 60, "saved_share": 0.478},
    "kept_states": {
        "first_block": 28,
        "size_bytes": 196_000_000,
        "folder": "cache/states",
        "is_made": False,
    },
    "forecast": {"seconds": 95.0, "peak_memory_bytes": 1.2e9},
}
SUMMARY: dict[str, Any] = {
    "run_id": "20261120-142233-k3f",
    "status": "done",
    "adapter": {"path": "project/runs/20261120-142233-k3f/adapter"},
    "evaluation": EVALUATION,
}


def stepped(step: int, *, num_steps: int = 40, time: float = 0.0) -> events.Stepped:
    return events.Stepped(
        time=time or 1000.0 + step,
        step=step,
        num_steps=num_steps,
        epoch=step / 10,
        loss=3.0 / step,
        learning_rate=1e-3,
        grad_norm=1.0,
        num_tokens=3000,
        num_trained_tokens=1000,
        seconds=1.0,
    )


def evaluated(step: int, loss: float) -> events.Evaluated:
    return events.Evaluated(
        step=step,
        epoch=step / 10,
        loss=loss,
        token_accuracy=0.5,
        num_trained_tokens=5000,
        is_best=True,
        seconds=2.0,
    )


def made_up_run() -> Iterator[events.Event]:
    yield events.Stage(name="read", detail="dataset/train.json")
    yield events.Warned(what=WARNING, propose="num_warmup_steps: 4")
    yield events.Planned(plan=PLAN)
    yield events.Stage(name="train")
    yield evaluated(0, 3.1)
    for step in range(1, 41):
        yield stepped(step)
        if step in (20, 40):
            yield evaluated(step, 3.0 / step)
    yield events.Saved(step=40, path="project/runs/x/checkpoints/step-000040")
    yield events.Trained(
        stopped_because="all steps done",
        num_steps=40,
        best_step=40,
        seconds=48.0,
        num_tokens=120_000,
        num_trained_tokens=40_000,
        peak_memory_bytes=600_000_000,
    )
    yield events.Stage(name="compare")
    yield events.Compared(evaluation=EVALUATION, answers=ANSWERS, seconds=9.0)
    yield events.Finished(summary=SUMMARY)
