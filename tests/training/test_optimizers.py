"""Each optimizer makes the update of its paper or of torch, on the right weights and by the settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from tiny_training import small_settings, tiny_training

from phinetune.base.events import Evaluated, Stepped
from phinetune.training.lion import Lion
from phinetune.training.optimizers import make_optimizer, weight_groups
from phinetune.training.settings import OptimizerName

KINDS = {
    "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor, "lion": Lion,
}  # fmt: skip


def lion_by_hand(weight, gradients, rate, beta1, beta2, decay):
    """Algorithm 2 of the paper, entry by entry in Python's own numbers."""
    out = []
    for value, column in zip(weight, zip(*gradients, strict=True), strict=True):
        momentum = 0.0
        for gradient in column:
            mixed = beta1 * momentum + (1 - beta1) * gradient
            sign = (mixed > 0) - (mixed < 0)
            value -= rate * (sign + decay * value)
            momentum = beta2 * momentum + (1 - beta2) * gradient
        out.append(value)
    return out


def test_lion_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=generator, dtype=torch.float64)
    gradients = torch.randn(20, 50, generator=generator, dtype=torch.float64)
    gradients[:, 0] = 0  # an entry without a gradient only decays
    weight = torch.nn.Parameter(start.clone())
    lion = Lion([weight], lr=0.03, betas=(0.9, 0.95), weight_decay=0.2)
    for gradient in gradients:
        weight.grad = gradient.clone()
        lion.step()
    expected = lion_by_hand(start.tolist(), gradients.tolist(), 0.03, 0.9, 0.95, 0.2)
    torch.testing.assert_close(weight.detach(), torch.tensor(expected, dtype=torch.float64))


def test_lion_leaves_weights_without_a_gradient_alone():
    weight = torch.nn.Parameter(torch.ones(3))
    lion = Lion([weight], lr=0.1, weight_decay=0.5)
    lion.step()
    assert torch.equal(weight, torch.ones(3))
    assert not lion.state


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_the_setting_names_the_optimizer_and_it_learns(name):
    rate = {"sgd": 0.5, "lion": 1e-3, "adafactor": 5e-3}.get(name, 5e-3)
    training = tiny_training(optimizer=name, learning_rate=rate, varied_seqlen=True, epochs=3.0)
    assert type(training.state.optimizer) is KINDS[name]
    losses = [event.loss for event in training.events() if isinstance(event, Evaluated)]
    trained = [training.state.best_loss]
    assert min(trained) < losses[0] - 0.01


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_matrices_decay_and_vectors_do_not(name):
    """Without a gradient's pull a matrix shrinks; a vector of an adapter stays as it is."""
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (4,)))
    adapter = SimpleNamespace(parameters=lambda: [vector, matrix])
    settings = small_settings(optimizer=name, weight_decay=0.5, learning_rate=0.1)
    groups = weight_groups(adapter, settings)
    assert [(group["params"], group["weight_decay"]) for group in groups] == [
        ([matrix], 0.5),
        ([vector], 0.0),
    ]
    optimizer = make_optimizer(adapter, settings)
    for weight in (matrix, vector):
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(vector, torch.ones(4))
    assert (matrix < 0.999).all()


def test_adafactor_moves_zeros_as_far_as_the_rate_says():
    """B begins at zero: a rate relative to its size would leave it there."""
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    adapter = SimpleNamespace(parameters=lambda: [weight])
    optimizer = make_optimizer(adapter, small_settings(optimizer="adafactor", learning_rate=1e-3))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.detach().abs().mean().item() == pytest.approx(1e-3, rel=1e-3)


def test_momentum_is_read():
    training = tiny_training(optimizer="sgd", sgd_momentum=0.7)
    (group,) = training.state.optimizer.param_groups
    assert group["momentum"] == 0.7


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_plus_makes_pefts_update():
    """Six steps at a falling rate: A at the rate, B at four times it."""
    from peft.optimizers import create_loraplus_optimizer
    from peft_twins import peft_twin, trained_of

    training = tiny_training("llama", loraplus_lr_ratio=4.0, num_training_steps=6, max_grad_norm=1e9)
    theirs = peft_twin("llama", r=4, target_modules=list(training.adapter.target_modules))
    twins = trained_of(theirs)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=4.0, betas=(0.9, 0.95), eps=1e-8
    )
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    training.adapter.restore({key: weight.detach() for key, weight in twins.items()})
    own_step = training.state.optimizer.step
    factors = [group["lr"] for group in optimizer.param_groups]

    def step(*args, **kwargs):
        rate = training.state.optimizer.param_groups[0]["lr"]
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = factor * rate
        for key, weight in training.adapter.named_parameters():
            twins[key].grad = weight.grad.clone()
        optimizer.step()
        return own_step(*args, **kwargs)

    training.state.optimizer.step = step
    best = dict(training.adapter.snapshot())
    for event in training.events():
        if isinstance(event, Stepped):
            best = training.adapter.snapshot()
    assert len(training.state.optimizer.param_groups) == 2
    for key, weight in best.items():
        torch.testing.assert_close(weight, twins[key].detach(), rtol=1e-6, atol=1e-7)


def test_without_lora_plus_all_matrices_are_one_group():
    training = tiny_training()
    (group,) = training.state.optimizer.param_groups
    assert group["rate_ratio"] == 1
