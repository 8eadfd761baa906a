"""Rows with the same beginning make the same updates in less work; the plan says how much less."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_rows, with_beginning
from tiny_training import TRAIN_LENGTHS, tiny_training

from phinetune.evaluation.scores import score_examples
from phinetune.models import shared_prefixes
from phinetune.models.memory import StepShape
from phinetune.training import step as step_module
from phinetune.training.sharing import sharing_of
from phinetune.training.step import pieces, train_step
from phinetune.training.validation import validate

NUM_SHARED = 40


def stirred(**changes):
    """A training whose adapter says something."""
    training = tiny_training(num_shared=NUM_SHARED, **{"finetune_train_batch_size": 12, **changes})
    with torch.no_grad():
        for parameter in training.adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return training


def one_step(training):
    result = train_step(
        training.base, training.adapter, training.state.optimizer, training.train_rows,
        [(row,) for row in range(12)], training.settings, dropout_seed=5, step=1,
    )  # fmt: skip
    return result, {name: weight.grad.clone() for name, weight in training.adapter.named_parameters()}


@pytest.fixture
def counted(monkeypatch):
    """The tokens of each forward pass of a step."""
    found = []
    original = step_module.trained_token_loss

    def loss(base, batch, *options):
        found.append(batch.num_tokens)
        return original(base, batch, *options)

    monkeypatch.setattr(step_module, "trained_token_loss", loss)
    return found


@pytest.mark.parametrize("name", ["phi3", "phi3.5-longrope", "gemma2", "gpt2"])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
def test_an_update_is_that_of_rows_which_share_nothing(name, changes, counted, monkeypatch):
    shared, gradients = one_step(stirred(name=name, **changes))
    monkeypatch.setattr(shared_prefixes, "MIN_SHARED_TOKENS", 1000)
    plain, expected = one_step(stirred(name=name, **changes))
    assert counted == [sum(TRAIN_LENGTHS) + NUM_SHARED, sum(TRAIN_LENGTHS) + 12 * NUM_SHARED]
    assert shared.loss == pytest.approx(plain.loss, rel=1e-6)
    assert shared.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)
    assert (shared.num_tokens, shared.num_trained_tokens) == (plain.num_tokens, plain.num_trained_tokens)
    for weight, gradient in gradients.items():
        assert (gradient - expected[weight]).abs().max() <= 1e-5 * expected[weight].abs().max() + 1e-7


def test_with_dropout_a_step_is_repeatable():
    """The rows then share the beginning's mask."""
    one, two = (one_step(stirred(lora_dropout=0.3)) for _ in range(2))
    assert one[0] == two[0]
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])


def test_pieces_count_shared_tokens_once(counted, monkeypatch):
    rows = with_beginning(random_rows([10] * 30), NUM_SHARED)
    sequences = [(row, row + 1) for row in range(0, 30, 2)]
    monkeypatch.setattr(step_module, "CPU_PIECE_TOKENS", 250)
    found = list(pieces(sequences, rows, 1000, True))
    # 40 + 20 rows of 10 make 240.
    assert [len(piece) for piece in found] == [20, 10]
    assert [row for piece in found for row in piece] == list(range(30))
    assert max(StepShape.of([rows[row] for row in piece]).num_tokens for piece in found) <= 250


def test_test_loss_and_scores_are_those_of_rows_which_share_nothing(monkeypatch):
    def measured():
        training = stirred()
        rows = training.test_rows
        found = validate(training.base, rows, training.plan.test_sequences, training.settings)
        return found, score_examples(training.base, rows)

    shared, shared_scores = measured()
    monkeypatch.setattr(shared_prefixes, "MIN_SHARED_TOKENS", 1000)
    plain, plain_scores = measured()
    assert shared.loss == pytest.approx(plain.loss, rel=1e-6)
    assert shared.token_accuracy == plain.token_accuracy
    assert shared_scores.nll_N == pytest.approx(plain_scores.nll_N, rel=1e-6)
    assert shared_scores.num_correct_N.tolist() == plain_scores.num_correct_N.tolist()
    assert shared_scores.num_trained_N.tolist() == plain_scores.num_trained_N.tolist()


def test_the_plan_says_what_is_shared():
    training = stirred(finetune_train_seqlen=4096)
    found = sharing_of(training.settings, training.first_epoch(), training.train_rows, is_cpu=True)
    assert found is not None
    assert found.num_leading_tokens == NUM_SHARED
    assert found.saved_share == 11 * NUM_SHARED / (12 * NUM_SHARED + sum(TRAIN_LENGTHS))
    training = tiny_training()
    assert sharing_of(training.settings, training.first_epoch(), training.train_rows, is_cpu=True) is None


def test_a_forecast_knows_that_less_is_computed(monkeypatch):
    """Seconds are for each token of the rows, memory is for those that are computed."""
    timed = []

    def seconds_of(work, device):
        timed.append(work.args[0])
        work()
        return float(work.args[0].num_tokens)  # a second for a token that is computed

    monkeypatch.setattr("phinetune.training.forecast.seconds_of", seconds_of)
    training = stirred(finetune_train_seqlen=4096)
    measured = training.probe()
    whole = 12 * NUM_SHARED + sum(TRAIN_LENGTHS)
    assert timed[0].num_example_tokens == whole
    assert measured.train_s == pytest.approx((whole - 11 * NUM_SHARED) / whole)


def test_of_many_rows_the_memory_is_a_bound_without_comparisons(monkeypatch):
    training = stirred(finetune_train_seqlen=4096)
    costs = training.probe().costs
    exact = training.bytes(costs)
    monkeypatch.setattr("phinetune.training.forecast.MOST_COMPARED_ROWS", 1)
    monkeypatch.setattr(shared_prefixes, "num_common", None)
    assert training.bytes(costs).step > 1.5 * exact.step


def test_the_shape_of_a_batch_is_that_of_what_is_laid():
    rows = with_beginning(random_rows([10, 20, 30]), NUM_SHARED)
    shape = StepShape.of([*rows, *random_rows([200], seed=5)])
    assert shape.num_tokens == NUM_SHARED + 60 + 200
    assert (shape.longest_segment, shape.longest_prefix) == (200, NUM_SHARED)
    assert StepShape.of(random_rows([10, 20])).longest_prefix == 0
