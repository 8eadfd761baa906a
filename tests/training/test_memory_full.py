"""A device whose memory is full at a step gets the same update in smaller pieces."""

from __future__ import annotations

import pytest
import torch
from tiny_training import tiny_training

from phinetune.base.errors import SpaceError
from phinetune.base.events import Stepped, Warned
from phinetune.training import step as step_module
from phinetune.training.step import halved

CHANGES = {
    "finetune_train_batch_size": 4, "num_training_steps": 4, "adam_epsilon": 1e-5, "learning_rate": 1e-3,
}  # fmt: skip


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def small_device(monkeypatch, most_tokens, *, from_call=1):
    """Forward passes of more tokens fail, the way a CUDA device does."""
    original, calls = step_module.trained_token_loss, []

    def limited(base, batch, *options):
        calls.append(batch.num_tokens)
        if batch.num_tokens > most_tokens and len(calls) >= from_call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(base, batch, *options)

    monkeypatch.setattr(step_module, "trained_token_loss", limited)
    return calls


def test_the_update_is_the_same_and_later_steps_are_small_from_the_start(monkeypatch):
    whole, small = tiny_training(**CHANGES), tiny_training(**CHANGES)
    expected = of(Stepped, whole.events())
    calls = small_device(monkeypatch, 90)
    events = small.events()
    steps = of(Stepped, events)
    assert [event.loss for event in steps] == pytest.approx([event.loss for event in expected], rel=1e-6)
    assert [event.num_trained_tokens for event in steps] == [event.num_trained_tokens for event in expected]
    one, two = whole.adapter.snapshot(), small.adapter.snapshot()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-6
    warned = of(Warned, events)
    assert len(warned) == small.state.num_halvings > 0
    assert "memory was full at step 1" in warned[0].what
    assert "finetune_train_batch_size: 2" in warned[0].propose
    assert sum(size > 90 for size in calls) == len(warned), "each halving is found out once"


def test_it_goes_on_when_memory_is_full_in_the_midst_of_a_step(monkeypatch):
    """What the first pieces of the failed attempt have added to the gradients must not count twice."""
    changes = {**CHANGES, "finetune_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole, small = tiny_training(**changes), tiny_training(**changes)
    expected = of(Stepped, whole.events())
    small_device(monkeypatch, 60, from_call=4)
    events = small.events()
    assert of(Warned, events)
    assert [event.grad_norm for event in of(Stepped, events)] == pytest.approx(
        [event.grad_norm for event in expected], rel=1e-5
    )


def test_a_single_example_that_does_not_fit_is_refused(monkeypatch):
    training = tiny_training(**CHANGES)
    before = training.adapter.snapshot()
    small_device(monkeypatch, 5)
    with pytest.raises(SpaceError, match="too small for a single example") as caught:
        training.events()
    assert "gradient_checkpointing" in caught.value.do
    assert all(torch.equal(before[name], value) for name, value in training.adapter.snapshot().items())


@pytest.mark.parametrize("num_halvings", [0, 1, 2, 3, 9])
def test_halving_keeps_every_row_in_order(num_halvings):
    found = list(halved([[0, 1, 2, 3, 4, 5, 6], [7]], num_halvings))
    assert [row for piece in found for row in piece] == list(range(8))
    assert max(len(piece) for piece in found) == max(1, -(-7 // 2**num_halvings))
