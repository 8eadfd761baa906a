"""Products in tiles are those of float64, for sizes that fill no tile, whatever lies beside them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.kernels.calls import kernels_for
from phinetune.kernels.products import LEAST_ROWS, product_of, products_for

# A bfloat16 has eight bits; sums are float32.
TOLERANCES = {torch.bfloat16: 2**-8, torch.float32: 2e-6}
PRODUCTS = products_for(*torch.zeros(2, LEAST_ROWS, LEAST_ROWS, dtype=torch.bfloat16))

needs_tiles = pytest.mark.skipif(
    PRODUCTS is None, reason="the processor has no tile registers (AMX), or there is no C compiler"
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).bfloat16()


def check(found, expected):
    scale = expected.abs().max().clamp(min=1)
    assert (found.double() - expected).abs().max() <= TOLERANCES[found.dtype] * scale


def laid(right_LN, is_upright):
    return right_LN if is_upright else right_LN.t().contiguous().t()


@needs_tiles
@pytest.mark.parametrize("is_upright", [True, False])
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 100),
    columns=st.integers(1, 100),
    depth=st.integers(1, 100),
    rank=st.integers(0, 70),
    has_bias=st.booleans(),
    is_float=st.booleans(),
)
def test_any_sizes(is_upright, rows, columns, depth, rank, has_bias, is_float):
    left, right = drawn(rows, depth), laid(drawn(depth, columns), is_upright)
    update = (drawn(rows, rank), laid(drawn(rank, columns), not is_upright)) if rank else None
    bias = drawn(columns) if has_bias else None
    out = torch.empty(rows, columns, dtype=torch.float32 if is_float else torch.bfloat16)
    expected = left.double() @ right.double()
    if update is not None:
        expected += update[0].double() @ update[1].double()
    expected = 0.75 * expected + (0 if bias is None else bias.double())
    found = PRODUCTS.multiply(left, right, update=update, bias_N=bias, scale=0.75, out=out)
    assert found is out
    check(found, expected)


@needs_tiles
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1500, 70, 40), (70, 6000, 90), (40, 64, 3000), (3, 9000, 2), (700, 2600, 300)],
)
@pytest.mark.parametrize("is_upright", [True, False])
def test_sizes_that_are_cut_into_several_goes(rows, depth, columns, is_upright):
    left, right = drawn(rows, depth), laid(drawn(depth, columns), is_upright)
    update = drawn(rows, 5), drawn(5, columns)
    found = PRODUCTS.multiply(left, right, update=update)
    check(found, left.double() @ right.double() + update[0].double() @ update[1].double())


@needs_tiles
def test_a_mask_drops_entries_of_either_factor_or_of_the_update():
    left, right, update = drawn(50, 96), drawn(96, 64), (drawn(50, 7), drawn(7, 64))
    kernels = kernels_for(left)

    def mask(of):
        words = kernels.draw_mask(-(-of.numel() // 64), 100)
        kept = kernels.drop(torch.ones_like(of), words, torch.empty_like(of))
        assert 0.4 < kept.float().mean() < 0.8  # 156 of 256 are kept
        return words, kept.double()

    for_left, for_right, for_update = mask(left), mask(right), mask(left.new_empty(50, 64))
    found = PRODUCTS.multiply(left, right, left_mask=for_left[0], right_mask=for_right[0])
    check(found, (left * for_left[1]) @ (right * for_right[1]))
    found = PRODUCTS.multiply(left, right, update=update, update_mask=for_update[0])
    added = (update[0].double() @ update[1].double()) * for_update[1]
    check(found, left.double() @ right.double() + added)


@needs_tiles
def test_entries_that_a_mask_drops_are_not_read_however_wild():
    left, right = drawn(50, 64), drawn(64, 32)
    words = torch.zeros(50, dtype=torch.int64)  # nothing is kept
    left[3, 5] = torch.nan
    assert not PRODUCTS.multiply(left, right, left_mask=words).any()


@needs_tiles
def test_what_lies_behind_a_factor_does_not_matter():
    left, right = (torch.full((80, 80), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    left[:37, :45], right[:45, :33] = drawn(37, 45), drawn(45, 33)
    out = torch.full((40, 40), 7.0, dtype=torch.bfloat16)
    PRODUCTS.multiply(left[:37, :45], right[:45, :33], out=out[:37, :33])
    check(out[:37, :33], left[:37, :45].double() @ right[:45, :33].double())
    assert (out[37:] == 7).all()
    assert (out[:, 33:] == 7).all()


@needs_tiles
def test_a_row_has_the_same_bits_beside_whatever_rows_and_by_however_many_threads():
    left, right = drawn(300, 2700), drawn(2700, 130)
    whole = PRODUCTS.multiply(left, right)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            for rows in (slice(0, 1), slice(7, 60), slice(33, 300)):
                assert torch.equal(PRODUCTS.multiply(left[rows], right), whole[rows])
    finally:
        torch.set_num_threads(threads)


@needs_tiles
def test_what_is_no_number_comes_through():
    left, right = drawn(60, 40), drawn(40, 50)
    left[4, 3], left[9, 3] = torch.nan, torch.inf
    found = PRODUCTS.multiply(left, right)
    assert found[4].isnan().all()
    assert not found[9].isfinite().any()
    assert found[[5, 8, 10]].isfinite().all()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.zeros(64, 8), torch.zeros(8, 8)),
        (torch.zeros(64, 8, dtype=torch.bfloat16), torch.zeros(8, 8)),
        (torch.zeros(LEAST_ROWS - 1, 8, dtype=torch.bfloat16), torch.zeros(8, 8, dtype=torch.bfloat16)),
        (torch.zeros(8, 64, dtype=torch.bfloat16).t(), torch.zeros(8, 8, dtype=torch.bfloat16)),
        (torch.zeros(64, 8, dtype=torch.bfloat16), torch.zeros(16, 16, dtype=torch.bfloat16)[::2, ::2]),
    ],
)
def test_other_factors_are_left_to_pytorch(left, right):
    assert products_for(left, right) is None
    if left.dtype == right.dtype:
        assert torch.equal(product_of(left, right), left @ right)
