"""Each kernel computes what its formula says in float64, for sizes that fill no vector."""

from __future__ import annotations

import math

import pytest
import torch

from phinetune.kernels.calls import Places, kernels_for

# Sums are float32 in both; a bfloat16 has eight bits, and norms round twice.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
SIZES = [1, 15, 64, 257]


@pytest.fixture(params=TOLERANCES, ids=str)
def dtype(request):
    if kernels_for(torch.zeros(1, dtype=request.param)) is None:
        pytest.skip("no C compiler to make the kernels with")
    return request.param


def drawn(*shape, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def check(found, expected, dtype):
    # Inputs are about 1: what is left of them where they cancel has their rounding.
    scale = expected.double().abs().max().clamp(min=1)
    assert (found.double() - expected.double()).abs().max() <= TOLERANCES[dtype] * scale


@pytest.mark.parametrize("width", SIZES)
def test_norm(width, dtype):
    x, branch, weight = (drawn(n, width, dtype=dtype) for n in (5, 5, 1))
    kernels = kernels_for(x)
    both, out, inverse = kernels.norm(x, branch, weight[0], 1e-5)
    exact = both.double().requires_grad_()
    check(both, x.double() + branch.double(), dtype)
    factor = torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    check(inverse[:, None], factor.detach(), torch.float32)
    check(out, (exact * factor * weight).detach(), dtype)
    d_out, d_past = drawn(5, width, dtype=dtype), drawn(5, width + 1, dtype=dtype)[:, :width].contiguous()
    (dx,) = torch.autograd.grad(exact * factor * weight, exact, d_out.double())
    check(kernels.norm_back(both, weight[0], inverse, d_out, None), dx, dtype)
    check(kernels.norm_back(both, weight[0], inverse, d_out, d_past), dx + d_past, dtype)


@pytest.mark.parametrize("width", SIZES)
def test_gate_of_large_and_small_inputs(width, dtype):
    both = drawn(4, 2 * width, dtype=dtype, scale=30.0)
    gate, up = both.chunk(2, dim=-1)
    d_out, d_both = drawn(4, width, dtype=dtype), torch.empty_like(both)
    exact = both.double().requires_grad_()
    plain = torch.nn.functional.silu(exact[:, :width]) * exact[:, width:]
    kernels = kernels_for(both)
    check(kernels.gate(gate, up), plain.detach(), dtype)
    kernels.gate_back(gate, up, d_out, *d_both.chunk(2, dim=-1))
    check(d_both, torch.autograd.grad(plain, exact, d_out.double())[0], dtype)


@pytest.mark.parametrize("num_entries", [*SIZES, 32_003])
@pytest.mark.parametrize(("smoothing", "softcap"), [(0.0, 0.0), (0.1, 0.0), (0.2, 5.0)])
def test_cross_entropy(num_entries, smoothing, softcap, dtype):
    logits = drawn(3, num_entries, dtype=dtype, scale=4.0)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    targets = torch.tensor([0, num_entries // 2, num_entries - 1])
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none", label_smoothing=smoothing)
    (slope,) = torch.autograd.grad(losses.sum(), exact)
    slope = slope * (1 - (exact.detach() / softcap) ** 2) if softcap else slope
    found = kernels_for(logits).cross_entropy_(logits, targets, smoothing, softcap)
    assert (found - losses.detach()).abs().max() <= 2e-6 * max(1.0, losses.max().item())
    check(logits, slope, dtype)


def test_a_target_beyond_the_logits_is_refused(dtype):
    logits = drawn(2, 5, dtype=dtype)
    with pytest.raises(IndexError, match="a target is 5, of 5 entries"):
        kernels_for(logits).cross_entropy_(logits, torch.tensor([1, 5]), 0.0, 0.0)


@pytest.mark.parametrize("turned", [8, 6, 0])
def test_rotation_and_its_way_back_undo_each_other(turned, dtype):
    x = drawn(7, 3 * 8 + 5, dtype=dtype)[:, : 3 * 8]
    angles = drawn(7, turned // 2, dtype=torch.float64).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    kernels = kernels_for(x)
    out = kernels.rotate(x, cos, sin, 8)
    heads = x.double().unflatten(1, (3, 8)).transpose(0, 1)
    first, second = heads[..., : turned // 2], heads[..., turned // 2 : turned]
    other = torch.cat([-second, first], dim=-1)
    expected = torch.cat([heads[..., :turned] * cos.double() + other * sin.double(), heads[..., turned:]], -1)
    check(out, expected, dtype)
    back = torch.empty_like(x)
    kernels.rotate_back(out, cos, sin, back)
    torch.testing.assert_close(back.double(), x.double(), atol=4 * TOLERANCES[dtype], rtol=0.02)


def test_softmax_sees_two_stretches_of_keys_and_nothing_else(dtype):
    scores = drawn(2, 3, 5, 96, dtype=dtype, scale=5.0)
    spans = torch.tensor([[0, 1, 32, 32], [3, 33, 64, 80], [0, 32, 32, 96], [31, 32, 70, 71], [0, 0, 0, 0]])
    spans = spans.to(torch.int32).expand(2, 5, 4).contiguous()
    keys = torch.arange(96)
    begin, end, prefix_begin, prefix_end = spans[..., None].unbind(2)
    is_seen = ((begin <= keys) & (keys < end)) | ((prefix_begin <= keys) & (keys < prefix_end))
    exact = scores.double().masked_fill(~is_seen[:, None], -math.inf).requires_grad_()
    expected = torch.softmax(exact, dim=-1).nan_to_num()
    kernels = kernels_for(scores)
    found = kernels.softmax_(scores.clone(), spans)
    check(found, expected.detach(), dtype)
    assert not found[(~is_seen)[:, None].expand(found.shape)].any()
    d = drawn(2, 3, 5, 96, dtype=dtype)
    gradient = found.double() * (d.double() - (found.double() * d.double()).sum(-1, keepdim=True))
    check(kernels.softmax_back_(d, found, spans), gradient, dtype)


def test_what_is_no_number_comes_through(dtype):
    kernels = kernels_for(torch.zeros(1, dtype=dtype))
    spans = torch.tensor([[[0, 32, 32, 32]]], dtype=torch.int32)
    for value in (math.nan, math.inf):
        scores = torch.zeros(1, 1, 1, 32, dtype=dtype)
        scores[..., 3] = value
        assert kernels.softmax_(scores, spans).isnan().any()
    one, bad = torch.ones(1, 8, dtype=dtype), torch.full((1, 8), math.nan, dtype=dtype)
    assert kernels.gate(bad, one).isnan().all()
    assert kernels.norm(bad, None, one[0], 1e-5)[1].isnan().all()
    assert kernels.cross_entropy_(bad.clone(), torch.tensor([1]), 0.0, 0.0).isnan().all()


def test_tiles_are_gathered_filled_up_and_put_back(dtype):
    x = drawn(2, 40, 8, dtype=dtype)
    places = Places(
        starts_S=torch.tensor([3, 20]), sizes_S=torch.tensor([5, 12]), adds_S=torch.tensor([0, 1])
    )
    tiles = torch.full((2, 2, 20, 8), 9.0, dtype=dtype)
    kernels = kernels_for(x)
    kernels.gather(x, places, tiles[:, :, :16], scale=0.5)
    expected = torch.zeros(2, 2, 16, 8, dtype=dtype)
    expected[0, :, :5], expected[1, :, :12] = x[:, 3:8] * 0.5, x[:, 20:32] * 0.5
    assert torch.equal(tiles[:, :, :16], expected)
    assert (tiles[:, :, 16:] == 9).all()
    out = torch.ones(40, 2, 8, dtype=dtype)
    kernels.scatter(tiles, places, out.transpose(0, 1), scale=2.0)
    put = torch.ones(40, 2, 8, dtype=dtype)
    put[3:8] = x[:, 3:8].transpose(0, 1)
    put[20:32] += x[:, 20:32].transpose(0, 1)
    assert torch.equal(out, put)


def test_what_is_drawn_and_computed_does_not_hang_on_the_number_of_threads(dtype):
    x = drawn(100, 257, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            torch.manual_seed(5)
            kernels = kernels_for(x)
            mask = kernels.draw_mask(5000, 26)
            results.append((mask, *kernels.norm(x, x, x[0], 1e-5), kernels.gate(x, x)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
