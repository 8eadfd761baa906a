"""The test loss is a mean over tokens: the same however the test set is cut up."""

from __future__ import annotations

import pytest
import torch
from tiny_training import TEST_LENGTHS, tiny_training

from phinetune.models.batch import PackedBatch
from phinetune.models.loss import token_scores
from phinetune.training import step as step_module
from phinetune.training.validation import validate


def stirred(**changes):
    """A training whose adapter says something, so that dropout would be seen."""
    training = tiny_training(**changes)
    with torch.no_grad():
        for parameter in training.adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return training


def measured(**changes):
    training = stirred(**changes)
    return validate(training.base, training.test_rows, training.plan.test_sequences, training.settings)


def expected():
    training = stirred()
    training.base.model.eval()
    return [token_scores(training.base, PackedBatch.lay([row])) for row in training.test_rows]


def test_it_is_the_mean_over_all_trained_tokens():
    scores = expected()
    nll = torch.cat([entry.nll_N for entry in scores])
    correct = torch.cat([entry.is_correct_N for entry in scores])
    result = measured()
    assert result.loss == pytest.approx(nll.mean().item(), rel=1e-6)
    assert result.token_accuracy == pytest.approx(correct.float().mean().item())
    assert result.num_trained_tokens == len(nll)


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_accumulation_steps": 1},
        {"eval_accumulation_steps": 3},
        {"eval_accumulation_steps": 1000},
        {"finetune_test_batch_size": 1},
        {"finetune_test_batch_size": 100},
        {"varied_seqlen": True},
        {"varied_seqlen": True, "finetune_test_batch_size": 1, "eval_accumulation_steps": 2},
        {"lora_dropout": 0.5},
    ],
)
def test_cutting_the_test_set_up_changes_nothing(changes):
    plain, other = measured(), measured(**changes)
    assert other.loss == pytest.approx(plain.loss, rel=1e-6)
    assert other.token_accuracy == pytest.approx(plain.token_accuracy)
    assert other.num_trained_tokens == plain.num_trained_tokens


def test_pieces_of_the_cpu_change_nothing(monkeypatch):
    plain = measured(varied_seqlen=True)
    monkeypatch.setattr(step_module, "CPU_PIECE_TOKENS", 9)
    assert measured(varied_seqlen=True).loss == pytest.approx(plain.loss, rel=1e-6)


@pytest.mark.parametrize("is_training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(is_training):
    training = tiny_training(lora_dropout=0.5)
    training.base.model.train(is_training)
    validate(training.base, training.test_rows, training.plan.test_sequences, training.settings)
    assert training.base.model.training is is_training
    assert len(TEST_LENGTHS) == len(training.test_rows)
