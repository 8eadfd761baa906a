"""The loop does what the plan says, keeps the best weights, and equals a plain loop on PEFT."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from tiny_training import TRAIN_LENGTHS, tiny_training
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from phinetune.base.errors import DivergedError
from phinetune.base.events import Evaluated, SaveDue, Stepped, Trained
from phinetune.training import loop
from phinetune.training.packing import batches, epoch_sequences
from phinetune.training.validation import Validation


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def largest_difference(one, two):
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


def by_peft(training, schedule):
    """The same training as a plain loop: PEFT, transformers' attention, torch's AdamW, one row at a time."""
    settings, rows = training.settings, training.train_rows
    targets = list(training.adapter.target_modules)
    config = LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules=targets)
    model = get_peft_model(tiny_model("phi3", implementation="eager"), config).train()
    names = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    with torch.no_grad():
        for name, parameter in training.adapter.named_parameters():
            names[name].copy_(parameter)
    optimizer = torch.optim.AdamW(
        names.values(),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=False,
        foreach=False,
    )
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=settings.num_warmup_steps if settings.has_warmup else 0,
        num_training_steps=training.plan.num_steps,
    )  # fmt: skip
    work, epoch = [], 0
    while len(work) < training.plan.num_steps:
        sequences = epoch_sequences(training.plan.train_sequences, seed=settings.seed, epoch=epoch)
        work += batches(sequences, settings.effective_batch_size)
        epoch += 1
    losses, rates, norms = [], [], []
    for group in work[: training.plan.num_steps]:
        chosen = [rows[row] for sequence in group for row in sequence]
        total = torch.zeros(())
        for row in chosen:
            ids = torch.from_numpy(row.ids).long()
            trained = torch.from_numpy(row.trained)[1:]
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            total = total + cross_entropy(logits[trained], ids[1:][trained], reduction="sum")
        loss = total / sum(row.num_trained for row in chosen)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(names.values(), settings.max_grad_norm)))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, rates, norms, {name: parameter.detach() for name, parameter in names.items()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("linear", "linear"),
        ("linear_with_warmup", "linear"),
        ("cosine", "cosine"),
        ("cosine_with_warmup", "cosine"),
    ],
)
def test_ten_steps_equal_a_plain_loop_on_peft(kind, schedule):
    training = tiny_training(
        lr_scheduler_type=kind, num_warmup_steps=3, num_training_steps=10, eval_steps=10, save_steps=10,
        weight_decay=0.1, max_grad_norm=0.3, adam_beta2=0.98, finetune_train_seqlen=50,
    )  # fmt: skip
    losses, rates, norms, weights = by_peft(training, schedule)
    steps = of(Stepped, training.events())
    assert [step.learning_rate for step in steps] == pytest.approx(rates, rel=1e-9, abs=1e-15)
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-5)
    assert [step.grad_norm for step in steps] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.3, "clipping must be at work"
    assert losses[-1] < losses[0], "something must have been learnt"
    assert largest_difference(training.adapter.snapshot(), weights) < 1e-4


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_same_seed_gives_the_same_adapter_byte_for_byte(dropout):
    def result(seed):
        training = tiny_training(seed=seed, lora_dropout=dropout, epochs=2.0)
        events = training.events()
        return training.adapter.snapshot(), [event.loss for event in of(Stepped, events)]

    (one, losses), (two, again), (other, _) = result(42), result(42), result(43)
    assert largest_difference(one, two) == 0
    assert losses == again
    assert largest_difference(one, other) > 1e-3


def test_seed_changes_order_and_dropout_apart_from_the_start():
    """With equal initial weights two seeds must still train differently."""
    results = []
    for seed in (1, 2):
        training = tiny_training(seed=seed, lora_dropout=0.0, epochs=1.0)
        training.adapter.reset(0)
        training.events()
        results.append(training.adapter.snapshot())
    assert largest_difference(*results) > 1e-4


@pytest.mark.parametrize("is_varied", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_one_epoch_does_what_the_plan_says(monkeypatch, is_varied, accumulation):
    training = tiny_training(varied_seqlen=is_varied, gradient_accumulation_steps=accumulation)
    used = []
    original = loop.train_step

    def spy(base, adapter, optimizer, rows, sequences, *args, **kwargs):
        used.append(sequences)
        return original(base, adapter, optimizer, rows, sequences, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", spy)
    events = training.events()
    plan, steps = training.plan, of(Stepped, events)
    (trained,) = of(Trained, events)
    assert [step.step for step in steps] == list(range(1, plan.num_steps + 1))
    assert all(step.num_steps == plan.num_steps for step in steps)
    assert trained.num_steps == plan.num_steps
    assert trained.num_tokens == plan.train.num_tokens == sum(step.num_tokens for step in steps)
    assert trained.num_trained_tokens == plan.train.num_trained_tokens
    assert steps[-1].epoch == 1.0
    sequences = [sequence for group in used for sequence in group]
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(TRAIN_LENGTHS)))
    assert len(sequences) == plan.train.num_sequences
    assert all(len(group) <= training.settings.effective_batch_size for group in used)
    if not is_varied:
        assert max(sum(TRAIN_LENGTHS[row] for row in sequence) for sequence in sequences) <= 64
        assert len(sequences) < len(TRAIN_LENGTHS)
    assert tuple(event.step for event in of(Evaluated, events)) == (0, *plan.evaluation_steps)
    assert tuple(event.step for event in of(SaveDue, events)) == plan.save_steps
    assert isinstance(events[-1], Trained)


def test_several_epochs_see_every_row_as_often():
    training = tiny_training(varied_seqlen=True, epochs=3.0)
    (trained,) = of(Trained, training.events())
    assert trained.num_tokens == 3 * training.plan.train.num_tokens


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"evaluation_strategy": "no"}, [6]),
        ({"evaluation_strategy": "epoch", "epochs": 1.0}, [0, 6]),
        ({"evaluation_strategy": "steps", "eval_delay": 4.0}, [0, 4, 6]),
        ({"evaluation_strategy": "steps", "eval_steps": 5, "save_steps": 5}, [0, 5, 6]),
    ],
)
def test_evaluations_come_as_asked(changes, steps):
    events = tiny_training(varied_seqlen=True, **changes).events()
    assert [event.step for event in of(Evaluated, events)] == steps


def with_losses(monkeypatch, losses):
    """Test losses as given, first that of the base."""
    given = iter(losses)
    monkeypatch.setattr(
        loop,
        "validate",
        lambda *args: Validation(loss=next(given), token_accuracy=0.5, num_trained_tokens=3),
    )


@pytest.mark.parametrize(
    ("patience", "losses", "num_steps", "best"),
    [
        (2, [9, 5, 6, 7, 8, 9, 9], 3, 1),
        (2, [9, 5, 6, 4, 5, 6, 9], 5, 3),
        (1, [9, 5, 5, 1, 1, 1, 1], 2, 1),  # an equal loss is no improvement
        (3, [1, 5, 6, 7, 6, 6, 6], 4, 1),  # the base's loss does not count: an adapter is chosen
        (5, [9, 5, 4, 3, 2, 1, 0], 6, 6),
    ],
)
def test_early_stopping_counts_evaluations_without_a_lower_loss(
    monkeypatch, patience, losses, num_steps, best
):
    with_losses(monkeypatch, losses)
    training = tiny_training(varied_seqlen=True, eval_steps=1, save_steps=1, early_stopping_patience=patience)
    snapshots, events = {}, []
    for event in loop.train(
        training.base, training.state, training.settings, training.plan, training.train_rows, []
    ):
        events.append(event)
        if isinstance(event, Evaluated):
            snapshots[event.step] = training.adapter.snapshot()
    (trained,) = of(Trained, events)
    assert (trained.num_steps, trained.best_step) == (num_steps, best)
    improved = [e.step for e in of(Evaluated, events) if e.is_best]
    lowest, expected = math.inf, []
    for step, value in enumerate(losses[1 : num_steps + 1], start=1):
        if value < lowest:
            lowest = value
            expected.append(step)
    assert improved == expected
    assert largest_difference(training.adapter.snapshot(), snapshots[best]) == 0
    assert ("early_stopping_patience" in trained.stopped_because) == (num_steps < 6)
    assert not training.base.model.training


def test_a_test_loss_that_is_not_finite_stops_the_run(monkeypatch):
    with_losses(monkeypatch, [9, math.nan])
    training = tiny_training(varied_seqlen=True)
    with pytest.raises(DivergedError, match="test loss is not finite") as caught:
        training.events()
    assert caught.value.where == "step 2"


def test_training_lowers_the_loss():
    training = tiny_training(
        varied_seqlen=True, epochs=6.0, learning_rate=2e-2, eval_steps=100, save_steps=100
    )
    steps = of(Stepped, training.events())
    assert sum(step.loss for step in steps[-6:]) < 0.9 * sum(step.loss for step in steps[:6])


def test_a_state_in_the_middle_goes_on_with_the_same_work():
    """A resumed run sees the rows that an unbroken one would have seen."""
    training = tiny_training(varied_seqlen=True, epochs=2.0)
    state = training.state
    whole = list(loop._steps_of_work(state, training.settings, training.plan))
    state.step = 8
    rest = list(loop._steps_of_work(state, training.settings, training.plan))
    assert len(whole) == 12
    assert rest == whole[8:]
