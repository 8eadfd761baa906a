"""Packing changes nothing: loss, scores and gradients are those of transformers, one example at a time."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, MIXTURES, SHORT_CONTEXT, VOCAB, by_transformers, random_rows, tiny_base
from torch.nn.functional import cross_entropy

from phinetune.models import attention
from phinetune.models import loss as loss_module
from phinetune.models.attention import PLAIN_MATH_BELOW, segment_attention
from phinetune.models.attention_tiles import TILE_ROWS
from phinetune.models.batch import PackedBatch
from phinetune.models.loss import token_scores, trained_token_loss

# On both sides of the sliding windows (8), of LongRoPE's short context (32), of a block of queries
# and of the length from which the fused kernel computes: all in one batch.
LENGTHS = [5, 40, 17, TILE_ROWS + 100, 9, SHORT_CONTEXT, SHORT_CONTEXT + 1, PLAIN_MATH_BELOW + 1, 2]
# Neighbours decide which segments are padded to one length, and so the order of float32 sums.
ROUNDING = 5e-6


@pytest.fixture(autouse=True)
def _plain_math_in_float32(monkeypatch):
    """Both ways of computing a segment are compared in float32, also the one meant for bfloat16."""
    monkeypatch.setattr(attention, "PLAIN_MATH_DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(attention, "PLAIN_WITH_KERNELS_BELOW", PLAIN_MATH_BELOW)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXTURES])
def test_packed_loss_and_scores_equal_transformers_one_by_one(name):
    base, rows = tiny_base(name), random_rows(LENGTHS)
    nll, is_correct = by_transformers(base, rows)
    batch = PackedBatch.lay(rows)

    loss, num_trained = trained_token_loss(base, batch)
    assert num_trained == len(nll) == sum(row.num_trained for row in rows)
    assert loss.item() == pytest.approx(nll.double().sum().item(), rel=1e-5)

    scores = token_scores(base, batch)
    torch.testing.assert_close(scores.nll_N, nll, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.is_correct_N, is_correct)
    expected = [i for i, row in enumerate(rows) for _ in range(row.num_trained)]
    assert scores.segment_N.tolist() == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_bites_where_the_architecture_differs(name):
    """A guard on the oracle: windows, caps and long factors change these very losses."""
    plain = {
        "phi3-window": {"sliding_window": None},
        "mistral-window": {"sliding_window": None},
        "gemma2": {"attn_logit_softcapping": None},
        "gemma3": {"sliding_window": 500},
        "smollm3": {"no_rope_layers": [1, 1]},
        "phi3.5-longrope": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "phi4-mini": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    }.get(name)
    other = tiny_base(name, **plain) if plain else tiny_base(name, seed=1)
    rows = random_rows(LENGTHS)
    nll, _ = by_transformers(tiny_base(name), rows)
    differing, _ = by_transformers(other, rows)
    assert (nll - differing).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXTURES])
def test_no_segment_sees_another(name):
    base, rows = tiny_base(name), random_rows(LENGTHS)
    before = base.hidden_states(PackedBatch.lay(rows))
    changed = random_rows(LENGTHS, seed=1)
    for place in (0, 3, len(rows) - 1):
        mixed = [changed[i] if i == place else row for i, row in enumerate(rows)]
        after = base.hidden_states(PackedBatch.lay(mixed))
        pairs = zip(before.split(LENGTHS), after.split(LENGTHS), strict=True)
        for i, (old, new) in enumerate(pairs):
            if i == place:
                assert not torch.allclose(old, new, atol=1e-3)
            else:
                torch.testing.assert_close(new, old, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["phi3.5-longrope", "phi4-mini"])
def test_hidden_states_of_mixed_lengths_come_back_in_order(name):
    base, rows = tiny_base(name), random_rows([50, 4, 60, 5, 33, 32])
    together = base.hidden_states(PackedBatch.lay(rows))
    apart = torch.cat([base.hidden_states(PackedBatch.lay([row])) for row in rows])
    torch.testing.assert_close(together, apart, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["phi3", "phi4-mini", "gemma2", "gpt2"])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 10_000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("num_filling", [0, 9])
def test_loss_and_gradient_of_the_hidden_states_are_torchs(
    name, rows_per_chunk, smoothing, num_filling, monkeypatch
):
    monkeypatch.setattr(loss_module, "CPU_CHUNK_ENTRIES", rows_per_chunk * VOCAB)
    monkeypatch.setattr(loss_module, "LEAST_CPU_ROWS", 1)
    base = tiny_base(name)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, VOCAB, (23,), generator=generator)
    hidden = torch.randn(23 + num_filling, 32, generator=generator, requires_grad=True)
    plain = hidden.detach().clone().requires_grad_()

    loss = loss_module._SummedLoss.apply(hidden, targets, base, smoothing, None, None, None)
    (3.5 * loss).backward()
    logits = base.head_logits(plain[:23]).float()
    expected = cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    (3.5 * expected).backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad, plain.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["phi3", "phi3-window", "phi3.5-longrope", "gemma2", "gpt2"])
def test_gradient_through_the_whole_model_is_autograds(name):
    base, rows = tiny_base(name), random_rows([5, TILE_ROWS + 9, 17, PLAIN_MATH_BELOW, 33])
    weight = next(p for n, p in base.model.named_parameters() if "layers.0" in n or "h.0" in n)
    weight.requires_grad_()
    loss, _ = trained_token_loss(base, PackedBatch.lay(rows))
    (ours,) = torch.autograd.grad(loss, weight)
    with base.plain_attention():
        total = torch.zeros(())
        for row in rows:
            ids = torch.from_numpy(row.ids).long()
            chosen = torch.from_numpy(row.trained)[1:]
            logits = base.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            total = total + cross_entropy(logits[chosen], ids[1:][chosen], reduction="sum")
        (theirs,) = torch.autograd.grad(total, weight)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-6
    assert theirs.abs().max() > 1e-3


def test_attention_dropout_keeps_the_cap_on_scores():
    """Gemma 2's cap must not be lost when its attention dropout is on."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (10 * torch.randn(1, 2, 16, 8, generator=generator) for _ in range(3))
    plain, _ = segment_attention(torch.nn.Identity(), q, k, v, None, softcap=1.0)
    draws = []
    for seed in range(300):
        torch.manual_seed(seed)
        draws.append(segment_attention(torch.nn.Identity(), q, k, v, None, softcap=1.0, dropout=0.2)[0])
    mean = torch.stack(draws).mean(0)
    assert not torch.allclose(draws[0], plain)
    assert (mean - plain).abs().mean() < 0.05 * plain.abs().mean() + 0.1


def test_targets_are_the_next_trained_tokens():
    rows = random_rows([4, 3], seed=3)
    batch = PackedBatch.lay(rows)
    expected = []
    for row in rows:
        following = [int(i) if t else -100 for i, t in zip(row.ids[1:], row.trained[1:], strict=True)]
        expected += [*following, -100]
    assert batch.targets_T.tolist() == expected
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.ids_T.tolist() == [*rows[0].ids.tolist(), *rows[1].ids.tolist()]
    assert batch.segment_lengths == (4, 3)
    assert batch.segment_starts == [0, 4]
    assert batch.num_tokens == 7
