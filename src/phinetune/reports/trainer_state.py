"""The course of a run as `trainer_state.json`, in the form of the Hugging Face Trainer.

Other tools draw their curves from this file. Knows nothing of where it is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from phinetune.reports.history import EvaluationRecord, StepRecord, history


def trainer_state(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `trainer_state.json` from the records of an event file.

    `log_history` has one entry per optimizer step and one per evaluation, in the order of training.
    `best_metric` is the lowest test loss after step 0, `best_global_step` the step it was reached at.
    """
    found = history(events)
    last = found.steps[-1] if found.steps else None
    best = found.best
    num_tokens = 0
    entries: list[tuple[tuple[int, int], dict[str, Any]]] = []
    for step in found.steps:
        num_tokens += step.num_tokens
        entries.append(((step.step, 0), _step_entry(step, num_tokens)))
    entries += [((entry.step, 1), _evaluation_entry(entry)) for entry in found.evaluations]
    return {
        "best_global_step": best.step if best else None,
        "best_metric": best.loss if best else None,
        "best_model_checkpoint": None,
        "epoch": last.epoch if last else 0.0,
        "global_step": last.step if last else 0,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": [entry for _, entry in sorted(entries, key=lambda item: item[0])],
        "logging_steps": 1,
        "max_steps": last.num_steps if last else 0,
        "num_input_tokens_seen": num_tokens,
        "num_train_epochs": _num_epochs(last) if last else 0,
    }


def _step_entry(step: StepRecord, num_tokens: int) -> dict[str, Any]:
    return {
        "epoch": step.epoch,
        "grad_norm": step.grad_norm,
        "learning_rate": step.learning_rate,
        "loss": step.loss,
        "num_input_tokens_seen": num_tokens,
        "step": step.step,
    }


def _evaluation_entry(entry: EvaluationRecord) -> dict[str, Any]:
    return {
        "epoch": entry.epoch,
        "eval_loss": entry.loss,
        "eval_runtime": entry.seconds,
        "eval_token_accuracy": entry.token_accuracy,
        "step": entry.step,
    }


def _num_epochs(last: StepRecord) -> int:
    """Whole epochs of the plan: steps per epoch are known from how far the last step had come."""
    return max(1, round(last.epoch * last.num_steps / last.step))
