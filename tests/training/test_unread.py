"""A changed setting that nothing reads is said, with what would make it count; defaults are never scolded."""

from __future__ import annotations

import pytest

from phinetune.training.settings import QUICKSTART, TrainingSettings
from phinetune.training.unread import unread

WARM = {"lr_scheduler_type": "cosine_with_warmup"}
CASES = [
    ({"num_warmup_steps": 20}, "num_warmup_steps: 20", WARM),
    ({"num_warmup_steps": 20, "warmup_ratio": 0.1, **WARM}, "num_warmup_steps: 20", {"warmup_ratio": None}),
    ({"warmup_ratio": 0.1}, "warmup_ratio: 0.1", WARM),
    ({"epochs": 3.0, "num_training_steps": 9}, "epochs: 3.0", {"num_training_steps": None}),
    ({"eval_steps": 32, "evaluation_strategy": "epoch"}, "eval_steps: 32", {"evaluation_strategy": "steps"}),
    ({"save_steps": 128, "evaluation_strategy": "epoch"}, "save_steps: 128", {"evaluation_strategy": "no"}),
    ({"eval_delay": 3.0, "evaluation_strategy": "no"}, "eval_delay: 3.0", {"evaluation_strategy": "epoch"}),
    (
        {"early_stopping_patience": 2, "evaluation_strategy": "no"},
        "early_stopping_patience: 2",
        {"evaluation_strategy": "epoch"},
    ),
    ({"adam_beta1": 0.5, "optimizer": "sgd"}, "adam_beta1: 0.5", {"optimizer": "lion"}),
    ({"adam_beta2": 0.5, "optimizer": "adafactor"}, "adam_beta2: 0.5", {"optimizer": "lion"}),
    ({"adam_epsilon": 0.5, "optimizer": "lion"}, "adam_epsilon: 0.5", {"optimizer": "adam"}),
    ({"sgd_momentum": 0.5}, "sgd_momentum: 0.5", {"optimizer": "sgd"}),
    (
        {"compare_max_new_tokens": 9, "compare_nsamples": 0},
        "compare_max_new_tokens: 9",
        {"compare_nsamples": 1},
    ),
]


@pytest.mark.parametrize(("values", "named", "mended"), CASES)
def test_a_setting_without_effect_is_said_until_something_reads_it(values, named, mended):
    (caution,) = unread(TrainingSettings(**values))
    assert caution.what.startswith(f"{named} has no effect: ")
    assert caution.propose
    assert unread(TrainingSettings(**{**values, **mended})) == []


@pytest.mark.parametrize("values", [{}, QUICKSTART])
def test_defaults_and_quickstart_have_nothing_without_effect(values):
    assert unread(TrainingSettings(**values)) == []
