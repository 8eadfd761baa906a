"""Attention by tiles is attention row by row: outputs and gradients, whatever the segments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attention_oracle import row_by_row
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.models.attention_stacks import stacks_of
from phinetune.models.attention_tiles import JOINED_TOKENS, TILE_ROWS, placed, tiles_of
from phinetune.models.plain_attention import PlainAttention, Shape

SIZE = 8
# The kernels are for float32 and bfloat16 only; float64 goes the other way.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}


def check(lengths, prefixes=(), **options):
    for dtype, tolerance in TOLERANCES.items():
        check_in(dtype, tolerance, lengths, prefixes, **options)


def check_in(
    dtype, tolerance, lengths, prefixes, *, heads=2, kv_heads=1, window=None, softcap=None, chosen=None
):
    segments = placed(tuple(lengths), tuple(prefixes))
    if chosen is not None:
        segments = tuple(itertools.compress(segments, chosen))
    shape = Shape(segments=segments, scale=0.3, window=window, softcap=softcap)
    drawn = torch.Generator().manual_seed(sum(lengths))
    q, k, v = (
        torch.randn(n, sum(lengths), SIZE, generator=drawn, dtype=torch.float64).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    ours = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    d_out = torch.randn(sum(lengths), heads, SIZE, generator=drawn, dtype=torch.float64)
    found, expected = (
        PlainAttention.apply(*ours, shape),
        row_by_row(q, k, v, segments, scale=0.3, window=window, softcap=softcap),
    )
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, check_dtype=False)
    for gradient, theirs in zip(
        torch.autograd.grad(found, ours, d_out.to(dtype)),
        torch.autograd.grad(expected, (q, k, v), d_out),
        strict=True,
    ):
        # What continuations add to a prefix's gradient is summed in float32.
        torch.testing.assert_close(gradient, theirs, atol=tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize("window", [None, 7, 200])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_segments_of_one_tile_of_several_and_joined_ones(window, softcap):
    check([5, 40, 1, 2 * TILE_ROWS + 9, 60, 60, 9, 33], window=window, softcap=softcap)


@pytest.mark.parametrize("window", [None, 20])
def test_continuations_of_a_prefix_see_it_and_change_it(window):
    check([5, 30, TILE_ROWS + 40, 50, 24, 70], [4, 4, 4, 4, None, 4], heads=6, kv_heads=2, window=window)


def test_rows_of_no_segment_are_zero():
    check([40, 30, TILE_ROWS + 5, 20], chosen=[True, False, True, False])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 70)),
    shared=st.integers(0, 6),
)
def test_any_segments(lengths, window, shared):
    prefixes = [len(lengths) if number < shared else None for number in range(len(lengths))]
    check([*lengths, 17], [*prefixes, None], window=window)


def test_keys_after_a_tile_are_not_multiplied():
    for length in (200, 256, 600, 1000):
        tiles = tiles_of(placed((length,)), None)
        computed = sum((tile.end - tile.row) * (tile.end - tile.key) for tile in tiles)
        # Half of a tile's own square is in the future.
        assert computed <= length * length / 2 + len(tiles) * math.ceil(length / len(tiles)) ** 2


def test_short_neighbours_are_joined_up_to_a_limit():
    joined = tiles_of(placed((20,) * 12), None)
    assert all(tile.end <= JOINED_TOKENS for tile in joined)
    assert len(joined) == 4


def test_tiles_of_one_shape_are_computed_together_up_to_a_limit():
    stacks = stacks_of(placed((20,) * 90 + (150, 150)), None)
    assert [len(stack.tiles) for stack in stacks] == [2, 16, 14]
