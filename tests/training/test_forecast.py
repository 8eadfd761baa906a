"""The forecast looks and does not touch."""

from __future__ import annotations

import pytest
import torch
from tiny_training import tiny_training

from phinetune.training import forecast as forecast_module
from phinetune.training.forecast import forecast


def forecast_of(training):
    return forecast(training.base, training.adapter, training.settings, training.plan, training.train_rows)


def test_nothing_is_changed_by_looking():
    training = tiny_training(lora_dropout=0.3)
    weights = training.adapter.snapshot()
    mode = training.base.model.training
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    forecast_of(training)
    assert torch.equal(torch.random.get_rng_state(), before)
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
    result = forecast_of(training)
    assert result.seconds == pytest.approx(expected)
    assert result.tokens_per_second == pytest.approx(100)


def test_memory_is_that_of_the_largest_piece(monkeypatch):
    shapes = []

    def spy(base, num_adapter_parameters, shape):
        shapes.append(shape)
        return 123

    monkeypatch.setattr(forecast_module, "forecast_bytes", spy)
    training = tiny_training(
        train_lengths=[5, 60, 7, 61], varied_seqlen=True, finetune_train_batch_size=1, lora_dropout=0.1,
        gradient_checkpointing=True,
    )  # fmt: skip
    assert forecast_of(training).peak_memory_bytes == 123
    (shape,) = shapes
    assert (shape.num_tokens, shape.longest_segment) == (61, 61)
    assert shape.num_trained_tokens == training.train_rows[3].num_trained
    assert shape.has_dropout
    assert shape.is_checkpointed
