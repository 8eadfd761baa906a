"""The memory forecast grows with everything that takes memory."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_base

from phinetune.models.memory import StepShape, forecast_bytes, peak_bytes, peak_resident_bytes

SHAPE = StepShape(
    num_tokens=2000, num_trained_tokens=1000, longest_segment=100, has_dropout=False, is_checkpointed=False
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_a_forecast_above_its_weights(name):
    base = tiny_base(name)
    assert forecast_bytes(base, 1000, SHAPE) > base.num_parameters * 4


@pytest.mark.parametrize(
    "change",
    [{"num_tokens": 4000}, {"longest_segment": 150}, {"has_dropout": True}, {"num_trained_tokens": 90_000}],
)
def test_more_work_takes_more_memory(change):
    base = tiny_base()
    assert forecast_bytes(base, 1000, replace(SHAPE, **change)) > forecast_bytes(base, 1000, SHAPE)


def test_a_larger_model_or_adapter_takes_more_memory():
    base = tiny_base()
    assert forecast_bytes(base, 2000, SHAPE) == forecast_bytes(base, 1000, SHAPE) + 16_000
    deeper = tiny_base(num_hidden_layers=4)
    assert forecast_bytes(deeper, 1000, SHAPE) > forecast_bytes(base, 1000, SHAPE)


def test_checkpointing_takes_less_memory():
    base = tiny_base(num_hidden_layers=6)
    checkpointed = replace(SHAPE, is_checkpointed=True)
    assert forecast_bytes(base, 1000, checkpointed) < forecast_bytes(base, 1000, SHAPE)


def test_the_peak_is_at_least_what_is_held_now():
    held = psutil.Process().memory_info().rss
    assert 0.9 * held <= peak_resident_bytes() < psutil.virtual_memory().total
    assert peak_bytes(torch.device("cpu")) >= peak_resident_bytes() * 0.9
