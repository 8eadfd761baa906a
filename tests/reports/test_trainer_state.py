"""trainer_state.json is one that transformers itself can load, and says what the events say."""

from __future__ import annotations

import json
import math

from phinetune.reports.history import history
from phinetune.reports.trainer_state import trainer_state

from .records import NUM_STEPS, course, evaluated, records, stepped


def test_transformers_loads_it_and_reads_the_same(tmp_path):
    from transformers import TrainerState

    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps(trainer_state(records(course())), allow_nan=False), encoding="utf-8")
    state = TrainerState.load_from_json(str(path))
    assert (state.global_step, state.max_steps, state.num_train_epochs) == (NUM_STEPS, NUM_STEPS, 2)
    assert (state.best_global_step, state.best_metric) == (30, 0.21)
    assert state.epoch == 2.0
    assert state.num_input_tokens_seen == 100 * NUM_STEPS


def test_log_history_has_every_step_and_evaluation_in_order():
    entries = trainer_state(records(course()))["log_history"]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, NUM_STEPS + 1))
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [0, 10, 20, 30, 40]
    assert [entry["step"] for entry in entries] == sorted(entry["step"] for entry in entries)
    step = next(entry for entry in entries if entry["step"] == 5)
    assert set(step) == {"epoch", "grad_norm", "learning_rate", "loss", "num_input_tokens_seen", "step"}


def test_a_loss_that_is_not_finite_stays_null_and_is_never_the_best():
    found = trainer_state(records([stepped(1, math.nan), evaluated(1, math.nan), evaluated(2, 5.0)]))
    assert found["log_history"][0]["loss"] is None
    assert found["best_global_step"] == 2


def test_the_base_model_is_not_the_best_step():
    found = trainer_state(records([evaluated(0, 0.1), stepped(1, 1.0), evaluated(1, 0.5)]))
    assert (found["best_global_step"], found["best_metric"]) == (1, 0.5)


def test_repeated_steps_of_a_resumed_run_replace_the_old_ones():
    first = [stepped(step, 9.0) for step in range(1, 8)]
    resumed = [stepped(step, 1.0) for step in range(5, 10)]
    found = history(records([*first, evaluated(7, 9.0), *resumed]))
    assert [(entry.step, entry.loss) for entry in found.steps] == [
        *((step, 9.0) for step in range(1, 5)),
        *((step, 1.0) for step in range(5, 10)),
    ]
    assert found.evaluations == ()


def test_evaluations_before_the_resumed_step_stay():
    found = history(
        records([stepped(1, 2.0), stepped(2, 2.0), evaluated(2, 1.5), stepped(3, 2.0), stepped(3, 1.0)])
    )
    assert [entry.step for entry in found.evaluations] == [2]


def test_an_event_file_without_steps_gives_an_empty_state():
    found = trainer_state([])
    assert (found["global_step"], found["log_history"], found["best_metric"]) == (0, [], None)
