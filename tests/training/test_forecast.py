"""The forecast looks and does not touch; its counts are those of the work that training will do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_training import tiny_training

from phinetune.training import forecast as forecast_module
from phinetune.training.forecast import training_seconds


def test_nothing_is_changed_by_looking():
    training = tiny_training(lora_dropout=0.3)
    weights = training.adapter.snapshot()
    mode = training.base.model.training
    before = torch.get_rng_state()
    result = training.probe()
    assert result.train_s > 0
    assert result.test_s > 0
    assert result.held_bytes > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert training.base.model.training == mode
    assert all(parameter.grad is None for parameter in training.adapter.parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in training.adapter.named_parameters())
    assert not training.state.optimizer.state


def test_seconds_are_those_of_all_steps_and_evaluations(monkeypatch):
    monkeypatch.setattr(forecast_module, "_seconds_per_token", lambda *args: (0.01, 0.001))
    training = tiny_training(varied_seqlen=True, epochs=2.0, eval_steps=4, save_steps=4)
    plan = training.plan
    assert plan.evaluation_steps == (4, 8, 12)
    expected = 2 * plan.train.num_tokens * 0.01 + 4 * plan.test.num_tokens * 0.001
    probe = training.probe()
    assert training_seconds(probe, training.settings, plan) == pytest.approx(expected)
    # The probe does without checkpointing; with it each step goes forward once more.
    settings = training.settings.model_copy(update={"gradient_checkpointing": True})
    longer = expected + 2 * plan.train.num_tokens * 0.01 * forecast_module.FORWARD_SHARE
    assert training_seconds(probe, settings, plan) == pytest.approx(longer)


def test_several_batches_are_timed_and_none_twice(monkeypatch):
    timed = []
    monkeypatch.setattr(forecast_module, "PROBE_TOKENS", 50)
    monkeypatch.setattr(forecast_module, "token_scores", lambda base, batch: timed.append(batch.num_tokens))
    training = tiny_training()
    training.probe()
    assert len(timed) == 1 + forecast_module.NUM_TIMED
    assert max(timed) <= 50


def test_memory_is_that_of_the_largest_piece():
    training = tiny_training(train_lengths=[5, 400, 7, 61], varied_seqlen=True, lora_dropout=0.1)
    costs = replace(training.probe().costs, tokens_multiple=1)
    one = training.bytes(costs, finetune_train_batch_size=1)
    row = training.train_rows[1]
    assert one.step == costs.step(
        forecast_module.StepShape(num_tokens=400, num_trained_tokens=row.num_trained, longest_segment=400),
        is_checkpointed=False,
    )
    assert training.bytes(costs, finetune_train_batch_size=2).step > one.step
    assert training.bytes(costs, finetune_train_batch_size=1, gradient_checkpointing=True).step < one.step
    assert one.most == one.kept + max(one.step, one.evaluation, one.saving)


def test_a_larger_test_batch_takes_more_memory():
    training = tiny_training(test_lengths=[60] * 20)
    costs = training.probe().costs
    one, all_ = (training.bytes(costs, finetune_test_batch_size=size).evaluation for size in (1, 20))
    assert all_ > one
