"""The learning rate of every step is the one transformers' schedules give."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from phinetune.training.schedule import learning_rate_factor

KINDS = {
    "linear": "linear",
    "linear_with_warmup": "linear",
    "cosine": "cosine",
    "cosine_with_warmup": "cosine",
}


def by_transformers(kind, num_steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(KINDS[kind], optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0), (10, 3), (37, 36), (100, 20), (10, 400), (10, 10)])
def test_every_rate_is_transformers(kind, num_steps, warmup):
    expected = by_transformers(kind, num_steps, warmup if kind.endswith("_with_warmup") else 0)
    ours = [learning_rate_factor(step, num_steps, kind, warmup) for step in range(num_steps)]
    assert ours == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_kinds_without_warmup_start_at_the_peak_whatever_the_setting_says(kind):
    assert learning_rate_factor(0, 100, kind, 400) == 1.0
    assert learning_rate_factor(0, 100, f"{kind}_with_warmup", 400) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_stays_at_zero_after_the_end(kind):
    assert learning_rate_factor(10, 10, kind, 2) == pytest.approx(0)
    assert learning_rate_factor(25, 10, kind, 2) == pytest.approx(0)
