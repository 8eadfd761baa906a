"""One adapted layer is the formula of the paper, forward and backward, with and without dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from phinetune.lora.dropout import BYTE_VALUES, drop_, dropout_threshold, dropped, keep_mask
from phinetune.lora.layers import LoraLinear

IN, OUT, RANK = 12, 20, 3


def random_layer(base, *, dropout=0.0, scaling=1.7, rank=RANK):
    layer = LoraLinear(base, rank=rank, scaling=scaling, dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.lora_A.normal_(generator=generator)
        layer.lora_B.normal_(generator=generator)
    return layer


def bases():
    torch.manual_seed(0)
    conv = Conv1D(OUT, IN)
    nn.init.normal_(conv.bias)
    return {"bias": nn.Linear(IN, OUT), "no bias": nn.Linear(IN, OUT, bias=False), "Conv1D": conv}


def by_autograd(layer, x, keep=None):
    """The same formula, left to autograd; the mask is given."""
    weight = layer.base.weight.t() if isinstance(layer.base, Conv1D) else layer.base.weight
    dropped = x if keep is None else x * keep * (BYTE_VALUES / (BYTE_VALUES - layer.threshold))
    return linear(x, weight, layer.base.bias) + layer.scaling * linear(
        linear(dropped, layer.lora_A), layer.lora_B
    )


def gradients(output, layer, x):
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    return torch.autograd.grad((output * direction).sum(), [x, layer.lora_A, layer.lora_B])


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
@pytest.mark.parametrize("shape", [(7, IN), (2, 7, IN), (IN,)])
def test_forward_and_gradients_are_the_formula(kind, shape):
    layer = random_layer(bases()[kind])
    x = torch.randn(shape, requires_grad=True)
    ours, theirs = layer(x), by_autograd(layer, x)
    assert ours.shape == theirs.shape == (*shape[:-1], OUT)
    assert_equal([ours], [theirs])
    assert_equal(gradients(ours, layer, x), gradients(theirs, layer, x))


@pytest.mark.parametrize("kind", ["bias", "Conv1D"])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_backward_uses_the_mask_of_the_forward(kind, dropout):
    layer = random_layer(bases()[kind], dropout=dropout)
    x = torch.randn(2, 50, IN, requires_grad=True)
    torch.manual_seed(3)
    ours = layer(x)
    torch.manual_seed(3)
    keep = dropped(torch.ones(x.shape), keep_mask(x, layer.threshold))
    assert 0 < keep.float().mean() < 1
    theirs = by_autograd(layer, x, keep)
    assert_equal([ours], [theirs])
    torch.manual_seed(4)  # a backward that drew again would draw another mask
    assert_equal(gradients(ours, layer, x), gradients(theirs, layer, x))


def test_dropout_is_right_on_average_and_off_in_evaluation():
    layer = random_layer(bases()["bias"], dropout=0.3)
    x = torch.randn(5, IN)
    with torch.no_grad():
        torch.manual_seed(0)
        mean = layer(x.repeat(20_000, 1)).view(20_000, 5, OUT).mean(0)
        layer.eval()
        exact = layer(x)
        assert torch.equal(exact, layer(x))
        layer.train()
        assert not torch.equal(exact, layer(x))
    assert (mean - exact).abs().max() < 0.02 * exact.abs().max()


def test_only_the_low_rank_branch_is_dropped():
    layer = random_layer(bases()["bias"], dropout=0.5)
    x = torch.randn(5, IN)
    with torch.no_grad():
        layer.lora_B.zero_()
        torch.testing.assert_close(layer(x), layer.base(x), rtol=0, atol=0)


@pytest.mark.parametrize(("rate", "threshold"), [(0.0, 0), (0.1, 26), (0.05, 13), (0.5, 128), (0.999, 255)])
def test_a_rate_is_rounded_to_a_256th(rate, threshold):
    assert dropout_threshold(rate) == threshold
    assert abs(threshold / BYTE_VALUES - rate) <= 1 / BYTE_VALUES


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [1, 26, 96, 128, 255])
def test_a_mask_drops_as_many_as_it_should_in_every_column(threshold, dtype):
    torch.manual_seed(0)
    ones = torch.ones(20_003, 9, dtype=dtype)
    mask = keep_mask(ones, threshold)
    keep = dropped(ones, mask)
    assert set(keep.unique().tolist()) <= {0, 1}
    assert torch.equal(keep, drop_(ones, mask))
    p = threshold / BYTE_VALUES
    deviation = math.sqrt(p * (1 - p) / 20_003)
    share = 1 - keep.float().mean(0)
    assert (share - p).abs().max() < 5 * deviation
    joint = ((1 - keep.float()).t() @ (1 - keep.float()) / 20_003).fill_diagonal_(p * p)
    assert (joint - p * p).abs().max() < 6 * math.sqrt(p * p * (1 - p * p) / 20_003)


def test_a_bfloat16_base_keeps_a_float32_adapter():
    layer = random_layer(nn.Linear(IN, OUT).bfloat16())
    exact = random_layer(nn.Linear(IN, OUT))
    exact.base.load_state_dict(layer.base.float().state_dict())
    layer.base.bfloat16()
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(64, IN).bfloat16().requires_grad_()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    ours = gradients(out, layer, x)
    assert [g.dtype for g in ours] == [torch.bfloat16, torch.float32, torch.float32]
    y = x.detach().float().requires_grad_()
    for a, b in zip([out, *ours], [exact(y), *gradients(exact(y), exact, y)], strict=True):
        # bfloat16 has 8 bits: each rounding is up to 0.4 %, and several add up.
        assert (a.float() - b).abs().max() <= 0.02 * b.abs().max()


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
@pytest.mark.parametrize("in_features", [96, 36])  # rows of a mask that begin with a word, and that do not
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("num_tokens", [70, 9])
def test_many_or_few_tokens_in_bfloat16_are_the_formula(kind, in_features, dropout, num_tokens):
    torch.manual_seed(0)
    base = {
        "bias": lambda: nn.Linear(in_features, OUT),
        "no bias": lambda: nn.Linear(in_features, OUT, bias=False),
        "Conv1D": lambda: Conv1D(OUT, in_features),
    }[kind]()
    layer = random_layer(base.bfloat16(), dropout=dropout)
    x = torch.randn(num_tokens, in_features).bfloat16().requires_grad_()
    torch.manual_seed(3)
    out = layer(x)
    ours = gradients(out, layer, x)
    torch.manual_seed(3)
    keep = None
    if dropout:
        ones = torch.ones_like(x)
        keep = dropped(ones, keep_mask(ones, layer.threshold)).double()
    exact, y = layer.double(), x.detach().double().requires_grad_()
    expected = by_autograd(exact, y, keep)
    for a, b in zip([out, *ours], [expected, *gradients(expected, exact, y)], strict=True):
        # Each rounding is up to 0.4 %, and several add up.
        assert (a.double() - b).abs().max() <= 0.02 * b.abs().max()


def test_only_what_is_needed_gets_a_gradient():
    layer = random_layer(nn.Linear(IN, OUT))
    layer(torch.randn(4, IN)).sum().backward()
    assert layer.base.weight.grad is None
    assert layer.base.bias.grad is None
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None


def test_a_fresh_layer_answers_as_its_base():
    layer = LoraLinear(nn.Linear(IN, OUT), rank=RANK, scaling=2.0)
    layer.reset(torch.Generator().manual_seed(0))
    x = torch.randn(5, IN)
    assert torch.equal(layer(x), layer.base(x))


def test_initial_a_fills_its_interval_and_b_is_zero():
    layer = LoraLinear(nn.Linear(400, OUT), rank=64, scaling=2.0)
    layer.reset(torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(400)
    reference = torch.empty(64, 400)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    assert 0.99 * bound < layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(reference.std().item(), rel=0.02)
    assert not layer.lora_B.any()


def test_delta_is_what_the_layer_adds():
    for kind, base in bases().items():
        layer = random_layer(base)
        x = torch.randn(5, IN)
        torch.testing.assert_close(
            layer(x) - base(x), x @ layer.delta_OI().t(), rtol=1e-4, atol=1e-4, msg=kind
        )


def test_a_loralib_layer_with_the_same_weights_gives_the_same():
    loralib = pytest.importorskip("loralib")
    theirs = loralib.Linear(IN, OUT, r=RANK, lora_alpha=6)
    layer = random_layer(nn.Linear(IN, OUT), scaling=2.0)
    with torch.no_grad():
        layer.base.weight.copy_(theirs.weight)
        layer.base.bias.copy_(theirs.bias)
        theirs.lora_A.copy_(layer.lora_A)
        theirs.lora_B.copy_(layer.lora_B)
    x = torch.randn(5, IN)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000, 70_001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mask_changes_no_bit_of_what_it_keeps(size, dtype):
    x = torch.randn(size).to(dtype)
    ours = dropped(x, keep_mask(x, 77))
    assert bool(((ours == x) | (ours == 0)).all())
    transposed = torch.randn(13, 7).t()
    mask = keep_mask(transposed, 77)
    assert torch.equal(dropped(transposed, mask), dropped(transposed.contiguous(), mask))
