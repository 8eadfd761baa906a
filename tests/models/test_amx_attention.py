"""Attention in tile registers is attention row by row: outputs and gradients, whatever the segments."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_oracle import row_by_row
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.kernels.attention import Options, tile_attention_for
from phinetune.models import attention
from phinetune.models.amx_attention import AmxAttention, families_of
from phinetune.models.attention_tiles import placed

# Of the largest entry: probabilities and gradients of scores are rounded to bfloat16's eight bits.
TOLERANCE = 2**-6

pytestmark = pytest.mark.skipif(
    tile_attention_for(torch.zeros(1, dtype=torch.bfloat16)) is None,
    reason="the processor has no tile registers (AMX), or there is no C compiler",
)


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_()


def check(lengths, prefixes=(), *, heads=2, kv_heads=1, size=40, window=None, softcap=None, chosen=None):
    segments = placed(tuple(lengths), tuple(prefixes))
    if chosen is not None:
        segments = tuple(itertools.compress(segments, chosen))
    tokens = sum(lengths)
    q, k, v = (drawn(n, tokens, size, seed=s) for s, n in enumerate((heads, kv_heads, kv_heads)))
    d_out = drawn(tokens, heads, size, seed=3).detach()
    found = AmxAttention.apply(q, k, v, segments, Options(scale=0.2, window=window, softcap=softcap))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = row_by_row(*exact, segments, scale=0.2, window=window, softcap=softcap)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, (q, k, v), d_out),
        torch.autograd.grad(expected, exact, d_out.double()),
        strict=True,
    )
    for ours, oracle in pairs:
        assert (ours.double() - oracle).abs().max() <= TOLERANCE * oracle.abs().max().clamp(min=0.1)


@pytest.mark.parametrize("window", [None, 7, 64, 200])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_segments_of_one_strip_of_several_and_of_single_tokens(window, softcap):
    check([5, 40, 1, 150, 64, 33], window=window, softcap=softcap)


@pytest.mark.parametrize("size", [16, 64, 80, 96, 128])
def test_heads_of_every_size(size):
    check([70, 20], heads=4, kv_heads=4, size=size)


@pytest.mark.parametrize("window", [None, 20])
def test_continuations_of_a_prefix_see_it_and_change_it(window):
    check([5, 30, 70, 50, 24, 70], [4, 4, 4, 4, None, 4], heads=6, kv_heads=2, window=window)


def test_a_prefix_may_be_computed_elsewhere():
    check([30, 20, 45], [2, 2, None], chosen=[True, True, False])


def test_rows_of_no_segment_are_zero():
    check([40, 30, 75, 20], chosen=[True, False, True, False])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(1, 70)),
    shared=st.integers(0, 4),
    size=st.integers(1, 70),
)
def test_any_segments(lengths, window, shared, size):
    prefixes = [len(lengths) if number < shared else None for number in range(len(lengths))]
    check([*lengths, 37], [*prefixes, None], window=window, size=size)


def test_the_number_of_threads_changes_no_bit():
    q, k, v = (drawn(4, 200, 64, seed=seed) for seed in range(3))
    found = []
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            out = AmxAttention.apply(q, k, v, placed((90, 60, 50), (2, 2, None)), Options(scale=0.1))
            found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("limit", [39, 40])
def test_a_batch_with_a_longer_segment_goes_the_other_ways(monkeypatch, limit):
    monkeypatch.setattr(attention, "TILES_UP_TO", limit)
    taken = []
    for kind in (attention.AmxAttention, attention.PlainAttention):
        apply = kind.apply
        monkeypatch.setattr(kind, "apply", lambda *args, k=kind, f=apply: taken.append(k) or f(*args))
    q, k, v = (drawn(2, 70, 16, seed=seed) for seed in range(3))
    out, _ = attention.segment_attention(
        torch.nn.Module(), q[None], k[None], v[None], None, segment_lengths=(30, 40), softcap=2.0
    )
    assert taken == [attention.AmxAttention if limit == 40 else attention.PlainAttention]
    exact = [x.detach().double() for x in (q, k, v)]
    expected = row_by_row(*exact, placed((30, 40)), scale=0.25, softcap=2.0)
    assert (out[0].double() - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_prefix_comes_after_all_that_continue_it_and_large_families_come_first():
    families = families_of(placed((10, 3, 4, 8, 90), (3, None, 3, None, None)))
    assert families.families.tolist() == [0, 1, 4, 5]
    # start, length, and the prefix's
    assert families.segments_S4.tolist() == [
        [25, 90, 0, 0],
        [0, 10, 17, 8],
        [13, 4, 17, 8],
        [17, 8, 0, 0],
        [10, 3, 0, 0],
    ]
