"""Leading tokens that examples share are computed once, and change neither loss, scores nor gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, MIXTURES, SHORT_CONTEXT, VOCAB, by_transformers, tiny_base

from phinetune.data.conversation import Source
from phinetune.lora.attach import LoraSettings, attach
from phinetune.models import attention
from phinetune.models.attention import PLAIN_MATH_BELOW
from phinetune.models.attention_tiles import JOINED_TOKENS, TILE_ROWS, placed, tiles_of
from phinetune.models.batch import NOT_TRAINED, PackedBatch
from phinetune.models.classifier import with_classifier
from phinetune.models.loss import token_scores, trained_token_loss
from phinetune.models.shared_prefixes import LONG_REST, MIN_SHARED_TOKENS, num_added, shared_prefixes
from phinetune.text.labelled import Labelled
from phinetune.text.render import Rendered

# As in test_packed_loss: the order of float32 sums differs.
ROUNDING = 5e-6
# Rests in one tile, in several, longer than a LongRoPE model's short context, and long enough for the kernel.
RESTS = [5, 9, 30, 7, JOINED_TOKENS + 3, TILE_ROWS + 100, PLAIN_MATH_BELOW, 6]


SOURCE = Source(file="x", line=1)


def row(ids: Sequence[int], first_trained: int, line: int = 1) -> Rendered:
    """Every second token from the first trained one on, and the last."""
    trained = np.zeros(len(ids), dtype=bool)
    trained[first_trained::2] = True
    trained[-1] = True
    return Rendered(ids=np.array(ids, dtype=np.int32), trained=trained, source=Source(file="x", line=line))


def chats(num_shared: int, rests: Sequence[int], *, seed: int = 0, num_masked: int = 2) -> list[Rendered]:
    """Rows with the same beginning; of the rest the first `num_masked` tokens are not trained."""
    rng = np.random.default_rng(seed)
    beginning = rng.integers(0, VOCAB, num_shared).tolist()
    return [
        # No two rests begin with the same token.
        row([*beginning, number, *rng.integers(0, VOCAB, length - 1)], num_shared + num_masked, number + 1)
        for number, length in enumerate(rests)
    ]


@pytest.fixture(params=["plain math", "kernel"])
def way(request, monkeypatch):
    """Both ways of computing a segment, in float32."""
    monkeypatch.setattr(attention, "PLAIN_WITH_KERNELS_BELOW", PLAIN_MATH_BELOW)
    if request.param == "plain math":
        monkeypatch.setattr(attention, "PLAIN_MATH_DTYPES", (torch.float32,))
    return request.param


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXTURES])
def test_loss_and_scores_equal_transformers_one_by_one(name, way):
    # Two system prompts, one row that shares nothing, and one whose second token is trained already.
    rows = [*chats(24, RESTS), *chats(40, [6, 11, 8], seed=1), *chats(0, [50], seed=2, num_masked=1)]
    rows = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    base = tiny_base(name)
    nll, is_correct = by_transformers(base, rows)
    batch = PackedBatch.lay(rows, shares_prefixes=True)
    assert batch.num_tokens == sum(len(r.ids) for r in rows) - 7 * 24 - 2 * 40

    loss, num_trained = trained_token_loss(base, batch)
    assert num_trained == len(nll) == sum(r.num_trained for r in rows)
    assert loss.item() == pytest.approx(nll.double().sum().item(), rel=1e-5)
    scores = token_scores(base, batch)
    torch.testing.assert_close(scores.nll_N, nll, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.is_correct_N, is_correct)
    assert scores.segment_N.tolist() == [i for i, r in enumerate(rows) for _ in range(r.num_trained)]


@pytest.mark.parametrize(
    "name", ["phi3", "phi3-window", "phi3.5-longrope", "llama", "gemma2", "gemma3", "gpt2"]
)
def test_gradients_of_the_adapter_are_those_of_single_rows(name, way):
    rows = [*chats(24, RESTS[:-2]), *chats(TILE_ROWS + 40, [6, JOINED_TOKENS + 9, 8], seed=1)]
    base = tiny_base(name)
    adapter = attach(base.model, LoraSettings(rank=4, alpha=8.0, dropout=0.0, target_modules=None), seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    base.model.train()
    apart = [PackedBatch.lay([one]) for one in rows]
    expected = gradients(base, adapter, apart)
    found = gradients(base, adapter, [PackedBatch.lay(rows, shares_prefixes=True)])
    for theirs, ours in zip(expected, found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-6
    assert max(gradient.abs().max() for gradient in expected) > 1e-2


def gradients(base, adapter, batches):
    for parameter in adapter.parameters():
        parameter.grad = None
    for batch in batches:
        trained_token_loss(base, batch)[0].backward()
    return [parameter.grad.clone() for parameter in adapter.parameters()]


def test_classes_are_those_of_single_rows(way):
    """A class is told by the last token of its own row, not by a prefix's."""
    base = with_classifier(tiny_base("phi3"), ["a", "b", "c"])
    base.classifier.reset(0)
    ids = [example.ids for example in chats(24, [5, 40, 9, 6])]
    rows = [
        Labelled(ids=i, trained=np.arange(len(i)) == len(i) - 1, source=SOURCE, class_number=number % 3)
        for number, i in enumerate(ids)
    ]
    batch = PackedBatch.lay(rows, shares_prefixes=True)
    assert batch.num_tokens == sum(len(i) for i in ids) - 3 * 24
    apart = [token_scores(base, PackedBatch.lay([one])) for one in rows]
    scores = token_scores(base, batch)
    torch.testing.assert_close(scores.nll_N, torch.cat([s.nll_N for s in apart]), rtol=1e-5, atol=1e-5)
    assert scores.segment_N.tolist() == [0, 1, 2, 3]
    loss, number = trained_token_loss(base, batch)
    assert number == 4
    assert loss.item() == pytest.approx(scores.nll_N.sum().item(), rel=1e-5)


def test_no_row_sees_the_rest_of_another(way):
    base, rests = tiny_base("phi3"), [5, 9, JOINED_TOKENS + 3, 30]
    rows, others = chats(24, rests), chats(24, rests, seed=0)
    others[2] = row([*rows[2].ids[:24], *([1] * rests[2])], 26)
    before, after = (base.hidden_states(PackedBatch.lay(r, shares_prefixes=True)) for r in (rows, others))
    lengths = [*rests, 24]
    for place, (old, new) in enumerate(zip(before.split(lengths), after.split(lengths), strict=True)):
        if place == 2:
            assert not torch.allclose(old, new, atol=1e-3)
        else:
            torch.testing.assert_close(new, old, rtol=0, atol=ROUNDING)


def test_only_tokens_that_predict_nothing_are_shared():
    """The last shared position would have to predict each row's own first token."""
    same = np.arange(40)
    rows = [row([*same, 50], 30), row([*same, 51], 35)]
    (shared,) = shared_prefixes(rows)
    assert (shared.num_tokens, shared.members) == (29, (0, 1))
    batch = PackedBatch.lay(rows, shares_prefixes=True)
    assert batch.segment_lengths == (12, 12, 29)
    assert batch.segment_prefixes == (2, 2, None)
    assert batch.targets_T[-29:].eq(NOT_TRAINED).all()
    assert batch.positions_T.tolist() == [*range(29, 41), *range(29, 41), *range(29)]
    plain = PackedBatch.lay(rows)
    assert batch.targets_T[batch.targets_T >= 0].tolist() == plain.targets_T[plain.targets_T >= 0].tolist()


def test_nothing_is_shared_where_all_tokens_are_trained():
    rows = [row(range(40), 1) for _ in range(3)]
    assert shared_prefixes(rows) == []
    batch = PackedBatch.lay(rows, shares_prefixes=True)
    assert batch.segment_lengths == (40, 40, 40)
    assert batch.segment_prefixes == ()


def test_a_long_rest_shares_only_a_prefix_as_long():
    rows = chats(100, [9, LONG_REST, LONG_REST + 1, 8, LONG_REST + 2])
    (shared,) = shared_prefixes(rows)
    assert (shared.num_tokens, shared.members) == (100, (0, 1, 3))
    assert shared_prefixes(rows[2:3] + rows[4:]) == []
    assert shared_prefixes(chats(LONG_REST + 2, [LONG_REST + 1, LONG_REST + 1]))
    assert num_added(rows[0], rows[1]) == LONG_REST
    assert num_added(rows[0], rows[2]) == LONG_REST + 101


def test_short_neighbours_of_one_prefix_are_one_tile():
    prefixes = (5, 5, 5, 5, 5, None, None)
    segments = placed((5, 40, 50, 30, 2 * TILE_ROWS + 4, 40, 9), prefixes)
    size = 192
    assert [(tile.lengths, tile.row, tile.end) for tile in tiles_of(segments, None)] == [
        ((5, 40), 0, 45),
        ((50,), 0, 50),
        ((30,), 0, 30),
        ((2 * TILE_ROWS + 4,), 0, size),
        ((2 * TILE_ROWS + 4,), size, 2 * size),
        ((2 * TILE_ROWS + 4,), 2 * size, 2 * TILE_ROWS + 4),
        ((40, 9), 0, 49),
    ]
    assert [tile.prefix_length for tile in tiles_of(segments, None)] == [40] * 6 + [0]


def test_equal_rows_keep_their_last_token():
    rows = [row(range(40), 39) for _ in range(3)]
    (shared,) = shared_prefixes(rows)
    assert shared.num_tokens == 38
    assert PackedBatch.lay(rows, shares_prefixes=True).segment_lengths == (2, 2, 2, 38)


def test_several_system_prompts_are_shared_each_by_its_own_rows():
    """All begin with the same words; what saves most is taken."""
    rows = [*chats(60, [9] * 5), *chats(60, [9] * 4, seed=1)]
    for one in rows:
        one.ids[:MIN_SHARED_TOKENS] = np.arange(MIN_SHARED_TOKENS)
    found = shared_prefixes(rows)
    assert [(shared.num_tokens, shared.members) for shared in found] == [
        (60, (0, 1, 2, 3, 4)),
        (60, (5, 6, 7, 8)),
    ]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=20)
)
def test_what_is_shared_is_the_same_in_all_members_and_in_no_other_prefix(made):
    """Rows of few different ids, so that much is common."""
    rows = [
        row([0] * (20 * kind) + [number % 2] * length, min(first, 20 * kind + length - 1) or 1)
        for number, (kind, length, first) in enumerate(made)
        if 20 * kind + length > 1
    ]
    members = []
    for shared in shared_prefixes(rows):
        assert shared.num_tokens >= MIN_SHARED_TOKENS
        assert len(shared.members) >= 2
        beginnings = {rows[member].ids[: shared.num_tokens].tobytes() for member in shared.members}
        assert len(beginnings) == 1
        assert all(rows[m].num_tokens > shared.num_tokens for m in shared.members)
        assert not any(rows[m].trained[: shared.num_tokens + 1].any() for m in shared.members)
        members += shared.members
    assert len(set(members)) == len(members)
    if rows:
        batch = PackedBatch.lay(rows, shares_prefixes=True)
        saved = sum(shared.num_saved for shared in shared_prefixes(rows))
        assert batch.num_tokens == sum(r.num_tokens for r in rows) - saved


def test_a_prefix_of_short_and_long_rows_has_both_kinds_of_positions():
    """LongRoPE: the prefix of a long row is not that of a short one."""
    base = tiny_base("phi3.5-longrope")
    rows = chats(24, [4, SHORT_CONTEXT, 5, SHORT_CONTEXT + 9])
    together = base.hidden_states(PackedBatch.lay(rows, shares_prefixes=True)).split(
        [4, SHORT_CONTEXT, 5, SHORT_CONTEXT + 9, 24]
    )
    for one, ours in zip(rows, together, strict=False):
        alone = base.hidden_states(PackedBatch.lay([one]))[24:]
        torch.testing.assert_close(ours, alone, rtol=0, atol=ROUNDING)
