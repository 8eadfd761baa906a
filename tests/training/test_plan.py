"""The plan says beforehand what a run will do, and warns of what will disappoint."""

from __future__ import annotations

import pytest
from tiny_models import random_rows
from tiny_training import fitted, small_settings

from phinetune.training.fitting import Fitted
from phinetune.training.plan import evaluation_steps, make_plan


def plan_of(train=(10,) * 40, test=(10,) * 8, **changes):
    settings = small_settings(**changes)
    return make_plan(settings, fitted(random_rows(train)), fitted(random_rows(test)))


def test_counts_are_those_of_the_data():
    lengths, tests = [12, 30, 7, 25, 18], [10, 22]
    rows = random_rows(lengths)
    plan = plan_of(lengths, tests)
    assert (plan.train.num_examples, plan.train.num_used) == (5, 5)
    assert plan.train.num_tokens == sum(lengths)
    assert plan.train.num_trained_tokens == sum(row.num_trained for row in rows)
    assert (plan.test.num_tokens, plan.test.num_sequences) == (32, 1)


@pytest.mark.parametrize(
    ("changes", "per_epoch", "num_steps"),
    [
        ({"varied_seqlen": True}, 20, 20),
        ({"varied_seqlen": True, "finetune_train_batch_size": 3}, 14, 14),
        ({"varied_seqlen": True, "gradient_accumulation_steps": 4}, 5, 5),
        ({"varied_seqlen": True, "epochs": 2.5}, 20, 50),
        ({"varied_seqlen": True, "epochs": 0.26}, 20, 6),
        ({"varied_seqlen": True, "epochs": 0.001}, 20, 1),
        ({"varied_seqlen": True, "epochs": 9.0, "num_training_steps": 7}, 20, 7),
        ({}, 4, 4),  # six rows of ten tokens share a sequence of 64
        ({"finetune_train_seqlen": 20}, 10, 10),
    ],
)
def test_steps_follow_from_epochs_batches_and_packing(changes, per_epoch, num_steps):
    plan = plan_of(**changes)
    assert (plan.steps_per_epoch, plan.num_steps) == (per_epoch, num_steps)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (4, 8, 10)),
        ({"eval_delay": 5.0}, (8, 10)),
        ({"eval_delay": 4.0}, (4, 8, 10)),
        ({"eval_delay": 99.0}, (10,)),
        ({"evaluation_strategy": "no"}, (10,)),
        ({"evaluation_strategy": "epoch"}, (3, 6, 9, 10)),
        ({"evaluation_strategy": "epoch", "eval_delay": 2.0}, (6, 9, 10)),
    ],
)
def test_evaluations_come_when_asked_and_always_at_the_end(changes, expected):
    settings = small_settings(**{"eval_steps": 4, "save_steps": 4, **changes})
    assert evaluation_steps(settings, num_steps=10, steps_per_epoch=3) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eval_steps": 2, "save_steps": 4}, (4, 8, 12, 16, 20)),
        ({"eval_steps": 2, "save_steps": 6}, (6, 12, 18, 20)),
        ({"evaluation_strategy": "epoch", "epochs": 2.0}, (20, 40)),
        ({"evaluation_strategy": "no", "save_steps": 7}, (7, 14, 20)),
    ],
)
def test_checkpoints_come_when_asked_and_always_at_the_end(changes, expected):
    assert plan_of(varied_seqlen=True, **changes).save_steps == expected


def test_every_checkpoint_has_a_test_loss():
    plan = plan_of(varied_seqlen=True, eval_steps=3, save_steps=6)
    assert set(plan.save_steps) <= set(plan.evaluation_steps)


def test_nothing_is_used_twice_and_limits_hold():
    plan = plan_of(finetune_train_nsamples=3, finetune_test_nsamples=1)
    rows = plan.train_sequences.rows
    assert len(set(rows)) == len(rows) == plan.train.num_used == 18
    assert plan.train.num_sequences == 3
    (tested,) = plan.test_sequences
    assert list(tested) == sorted(set(tested))
    assert plan.test.num_used == 6


def warnings(**kwargs):
    return {caution.what: caution.propose for caution in plan_of(**kwargs).warnings}


def test_a_long_warmup_is_reported_with_a_value_that_fits():
    changes = {"lr_scheduler_type": "linear_with_warmup", "num_warmup_steps": 400, "varied_seqlen": True}
    found = {what: propose for what, propose in warnings(**changes).items() if "warm-up" in what}
    ((what, propose),) = found.items()
    assert "never reaches its peak" in what
    assert propose == "num_warmup_steps: 1"
    assert plan_of(**changes).warmup_share == 1
    changes["num_warmup_steps"] = 4
    assert not [what for what in warnings(**changes) if "warm-up" in what]
    assert plan_of(**changes).warmup_share == 0.2
    changes["lr_scheduler_type"] = "linear"
    assert plan_of(**changes).warmup_share == 0


def test_what_is_left_out_is_counted_and_the_proposed_number_takes_all_in():
    changes = {"finetune_train_nsamples": 3, "finetune_test_nsamples": 1}
    found = warnings(**changes)
    what = "22 of 40 training examples are left out by finetune_train_nsamples (3)"
    assert what in found
    enough = int(found[what].removeprefix("finetune_train_nsamples: "))
    assert plan_of(finetune_train_nsamples=enough).train.num_used == 40
    assert "2 of 8 test examples are left out by finetune_test_nsamples (1)" in found


def test_few_examples_and_few_steps_are_reported():
    found = warnings()
    assert "40 training examples are few; a few thousand are advised" in found
    assert any(what.startswith("only 4 steps per epoch") for what in found)
    assert not any(what.startswith("only") for what in warnings(varied_seqlen=True))
    assert not any("are few" in what for what in warnings(train=(5,) * 1000))


def test_too_rare_evaluations_are_reported_with_a_pair_that_is_valid():
    found = warnings(varied_seqlen=True, eval_steps=64, save_steps=64)
    (propose,) = [propose for what, propose in found.items() if "eval_steps (64)" in what]
    values = {key: int(value) for key, value in (line.split(": ") for line in propose.splitlines())}
    assert not any("eval_steps" in what for what in warnings(varied_seqlen=True, **values))


def test_cut_and_dropped_chats_are_reported():
    rows = random_rows([10] * 5)
    for changes in ({"num_cut": 3, "num_dropped": 0}, {"num_cut": 0, "num_dropped": 3}):
        some = Fitted(rendered=rows, indices=list(range(5)), num_split=0, **changes)
        plan = make_plan(small_settings(overlong="cut"), some, fitted(rows))
        assert any("3 cut" in c.what or "3 left out" in c.what for c in plan.warnings)
        assert plan.train.num_examples == 5 + changes["num_dropped"]


def test_dora_with_dropout_is_reported_as_slow():
    def said(**changes):
        return [caution.propose for caution in plan_of(**changes).warnings if "DoRA" in caution.what]

    assert said(use_dora=True, lora_dropout=0.1) == ["lora_dropout: 0.0"]
    assert said(use_dora=True, lora_dropout=0.0) == said(lora_dropout=0.1) == []
