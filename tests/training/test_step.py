"""One update: the same however it is cut up, repeatable, and not made at all when it would be NaN."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training import TRAIN_LENGTHS, tiny_training
from torch.utils._python_dispatch import TorchDispatchMode

from phinetune.base.errors import DivergedError
from phinetune.models import loss as loss_module
from phinetune.training import step as step_module
from phinetune.training.optimizers import make_optimizer
from phinetune.training.step import pieces, train_step


def run_step(training, sequences=None, *, number=1, dropout_seed=5):
    sequences = sequences or [(row,) for row in range(len(training.train_rows))]
    return train_step(
        training.base, training.adapter, training.state.optimizer, training.train_rows, sequences,
        training.settings, dropout_seed=dropout_seed, step=number,
    )  # fmt: skip


def largest_difference(one, two):
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("name", ["phi3", "gemma2", "gpt2"])
def test_one_large_batch_equals_many_small_ones(name):
    lengths = (TRAIN_LENGTHS * 2)[:16]
    results = {}
    for batch_size in (16, 1, 4):
        training = tiny_training(
            name, train_lengths=lengths, varied_seqlen=True, finetune_train_batch_size=batch_size,
            gradient_accumulation_steps=16 // batch_size, num_training_steps=3, learning_rate=1e-3,
            adam_epsilon=1e-5,  # else an entry whose gradient is rounding error moves as far as any other
        )  # fmt: skip
        events = training.events()
        losses = [event.loss for event in events if type(event).__name__ == "Stepped"]
        results[batch_size] = (losses, training.adapter.snapshot())
    for batch_size in (1, 4):
        assert results[batch_size][0] == pytest.approx(results[16][0], rel=1e-6)
        assert largest_difference(results[batch_size][1], results[16][1]) < 1e-6
    assert largest_difference(results[16][1], tiny_training(name).adapter.snapshot()) > 5e-4


def test_pieces_on_a_cpu_change_nothing(monkeypatch):
    whole, cut = tiny_training(finetune_train_batch_size=16), tiny_training(finetune_train_batch_size=16)
    one = run_step(whole)
    monkeypatch.setattr(step_module, "CPU_PIECE_TOKENS", 30)
    two = run_step(cut)
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-5)
    assert largest_difference(whole.adapter.snapshot(), cut.adapter.snapshot()) < 1e-6


@pytest.mark.parametrize("is_cpu", [True, False])
def test_pieces_keep_every_row_and_their_limits(monkeypatch, is_cpu):
    monkeypatch.setattr(step_module, "CPU_PIECE_TOKENS", 60)
    training = tiny_training()
    sequences = [(0, 1), (2,), (3, 4), (5,), (6, 7, 8), (9,), (10, 11)]
    found = list(pieces(sequences, training.train_rows, 3, is_cpu))
    assert [row for piece in found for row in piece] == list(range(12))
    sizes = [sum(TRAIN_LENGTHS[row] for row in piece) for piece in found]
    if is_cpu:
        longest = max(sum(TRAIN_LENGTHS[row] for row in sequence) for sequence in sequences)
        assert max(sizes) <= max(60, longest)
        assert len(found) > 3
    else:
        assert found == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_the_loss_is_the_mean_over_the_trained_tokens_of_the_step():
    training = tiny_training()
    sequences = [(0, 1), (4,)]
    rows = [training.train_rows[row] for row in (0, 1, 4)]
    scores = loss_module.token_scores(training.base, loss_module.PackedBatch.lay(rows))
    result = run_step(training, sequences)
    assert result.loss == pytest.approx(scores.nll_N.mean().item(), rel=1e-5)
    assert result.num_trained_tokens == sum(row.num_trained for row in rows)
    assert result.num_tokens == sum(row.num_tokens for row in rows)


def test_gradients_are_scaled_down_to_the_largest_norm_and_never_up():
    free, capped = tiny_training(max_grad_norm=1e6), tiny_training(max_grad_norm=0.01)
    first, second = run_step(free), run_step(capped)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-6)
    assert first.grad_norm > 0.02
    norms = [
        math.sqrt(sum(float(p.grad.square().sum()) for p in training.adapter.parameters()))
        for training in (free, capped)
    ]
    assert norms[0] == pytest.approx(first.grad_norm, rel=1e-5)
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_is_repeatable_and_leaves_the_random_numbers_alone(dropout):
    results = []
    for global_seed in (1, 2):
        training = tiny_training(lora_dropout=dropout)
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        run_step(training)
        run_step(training, dropout_seed=6)
        assert torch.equal(torch.random.get_rng_state(), before)
        results.append(training.adapter.snapshot())
    assert largest_difference(*results) == 0


def test_the_dropout_seed_decides_the_mask():
    one, two = tiny_training(lora_dropout=0.3), tiny_training(lora_dropout=0.3)
    run_step(one, dropout_seed=1)
    run_step(two, dropout_seed=2)
    assert largest_difference(one.adapter.snapshot(), two.adapter.snapshot()) > 1e-4


def spoil_loss(training, monkeypatch):
    original = step_module.trained_token_loss

    def spoiled(base, batch, label_smoothing):
        loss, number = original(base, batch, label_smoothing)
        return loss * math.nan, number

    monkeypatch.setattr(step_module, "trained_token_loss", spoiled)
    return "nan"


def spoil_gradient(training, monkeypatch):
    layer = training.adapter.layers["model.layers.1.self_attn.o_proj"]
    layer.lora_B.register_hook(lambda gradient: gradient * math.inf)
    return "model.layers.1.self_attn.o_proj.lora_B"


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_nan_stops_the_run_before_it_reaches_weights_or_optimizer(spoil, monkeypatch):
    training = tiny_training()
    run_step(training)
    weights = training.adapter.snapshot()
    moments = [
        {key: torch.as_tensor(value).clone() for key, value in state.items()}
        for state in training.state.optimizer.state.values()
    ]
    at_fault = spoil(training, monkeypatch)
    with pytest.raises(DivergedError) as caught:
        run_step(training, [(0, 1), (3,)], number=7)
    assert caught.value.where == "step 7, rows tiny.json:1, tiny.json:2, tiny.json:4"
    assert at_fault in caught.value.why
    assert "learning_rate" in caught.value.do
    assert largest_difference(training.adapter.snapshot(), weights) == 0
    after = training.state.optimizer.state.values()
    assert all(
        torch.equal(old[key], new[key]) for old, new in zip(moments, after, strict=True) for key in old
    )
    assert all(parameter.grad is None for parameter in training.adapter.parameters())


@pytest.mark.parametrize("name", ["phi3", "gemma2", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_update(name, dropout):
    results = []
    for is_checkpointed in (False, True):
        training = tiny_training(name, lora_dropout=dropout, gradient_checkpointing=is_checkpointed)
        result = run_step(training)
        gradients = {n: p.grad.clone() for n, p in training.adapter.named_parameters()}
        results.append((result.loss, gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert largest_difference(results[0][1], results[1][1]) < 1e-6


def test_checkpointing_recomputes_the_blocks():
    """A guard on the test above: it must not compare a run with itself."""
    counts = []
    for is_checkpointed in (False, True):
        training = tiny_training(gradient_checkpointing=is_checkpointed)
        calls = []
        layer = training.adapter.layers["model.layers.0.self_attn.qkv_proj"]
        layer.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        run_step(training, [(0, 1, 2)])
        counts.append(len(calls))
    assert counts == [1, 2]


def test_the_optimizer_holds_the_settings_and_the_adapter_alone():
    training = tiny_training(
        adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-7, weight_decay=0.3, learning_rate=0.01
    )
    optimizer = make_optimizer(training.adapter, training.settings)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.8, 0.9), 1e-7, 0.3, 0.01)
    assert [id(p) for p in group["params"]] == [id(p) for p in training.adapter.parameters()]
    assert all(parameter.dtype == torch.float32 for parameter in group["params"])


def test_a_step_asks_the_device_for_single_numbers_never():
    """Each would make the host wait for a GPU; loss and norm come back together, as one tensor."""

    class Counting(TorchDispatchMode):
        asked = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.asked += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    training = tiny_training()
    run_step(training)  # what is asked once is asked here
    with Counting() as counting:
        run_step(training)
    assert counting.asked == 0
    with Counting() as counting:
        float(torch.ones(()))
    assert counting.asked == 1
