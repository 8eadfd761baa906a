"""Blocks that train faster on a CPU compute what transformers' own modules do, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import as_base, random_rows, tiny_model

from phinetune.lora.attach import LoraSettings, attach
from phinetune.models import body_functions
from phinetune.models.batch import PackedBatch
from phinetune.models.body import speed_up
from phinetune.models.loss import trained_token_loss

KNOWN = ("phi3", "phi4-mini", "llama", "mistral-window", "qwen2", "qwen3")


def loss_and_gradients(model, dtype=torch.float32, is_checkpointed=False):
    model = model.to(dtype)
    if is_checkpointed:
        enable = getattr(model, "activation_checkpointing_enable", None)  # renamed on the way to version 6
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    base = as_base(model)
    # No dropout: where the last block spares rows their masks differ.
    adapter = attach(model, LoraSettings(rank=3, alpha=6), seed=4)
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    model.train()
    torch.manual_seed(7)
    batch = PackedBatch.lay(random_rows([9, 4, 17, 30]))
    loss, _ = trained_token_loss(base, batch)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in adapter.named_parameters()}


@pytest.fixture
def _passes(passes, monkeypatch):
    monkeypatch.setattr(body_functions, "BLOCK_ENTRIES", 300)


@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_has_the_loss_and_gradients_of_the_unmodified_one(name, dtype, tolerance):
    model = tiny_model(name)
    loss, gradients = loss_and_gradients(speed_up(copy.deepcopy(model)), dtype)
    plain_loss, plain_gradients = loss_and_gradients(model, dtype)
    assert abs(loss - plain_loss) <= tolerance * 0.1 * plain_loss
    for weight, plain in plain_gradients.items():
        assert (gradients[weight] - plain).norm() <= tolerance * plain.norm(), weight


@pytest.mark.parametrize("name", sorted({*KNOWN} - {"phi4-mini"}))  # whose short and long rows go apart
def test_the_last_block_reads_no_other_rows_after_attention_than_the_loss_wants(name):
    model = speed_up(tiny_model(name))
    read = [[], []]
    for layer, found in zip(model.get_decoder().layers[-2:], read, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, inputs, found=found: found.append(inputs[0].shape[1]))
    rows = random_rows([9, 4, 17, 130])
    trained_token_loss(as_base(model.requires_grad_(False)), PackedBatch.lay(rows))
    num_wanted = sum(row.num_trained for row in rows)
    assert read == [[256], [-(-num_wanted // 32) * 32]]


@pytest.mark.parametrize("name", ["phi3", "qwen3"])
def test_checkpointing_computes_each_block_again_and_changes_nothing(name):
    models = [speed_up(tiny_model(name)) for _ in range(2)]
    calls = [0, 0]
    for index, model in enumerate(models):

        def count(*_, index=index):
            calls[index] += 1

        model.get_decoder().layers[0].mlp.register_forward_pre_hook(count)
    (loss, gradients), (again, gradients_again) = (
        loss_and_gradients(model, is_checkpointed=index == 1) for index, model in enumerate(models)
    )
    torch.testing.assert_close(again, loss)
    for weight, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[weight], gradient, rtol=1e-4, atol=1e-6)
    assert calls == [1, 2]


@pytest.mark.parametrize("name", KNOWN)
def test_every_block_norm_and_mlp_of_a_known_model_is_sped_up(name):
    model = speed_up(tiny_model(name))
    kinds = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    family = "phi3" if name.startswith("phi") else name.partition("-")[0]
    assert {kind.lower().removeprefix(family) for kind in kinds} >= {"rmsnorm", "mlp", "decoderlayer"}


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_of_an_unknown_model_nothing_but_plain_linear_layers_is_touched(name):
    touched = [module for module in speed_up(tiny_model(name)).modules() if "forward" in vars(module)]
    assert {type(module) for module in touched} <= {torch.nn.Linear}


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_frozen_linear_layer_passes_its_gradient_on(has_bias):
    layer = speed_up(torch.nn.Linear(40, 24, bias=has_bias).bfloat16().requires_grad_(False))
    x = torch.randn(2, 50, 40).bfloat16().requires_grad_()
    d_out = torch.randn(2, 50, 24).bfloat16()
    y = x.detach().double().requires_grad_()
    expected = torch.nn.functional.linear(y, *(p.double() for p in layer.parameters()))
    found = layer(x)
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)
    pair = (
        torch.autograd.grad(out, of, d.to(out.dtype))
        for out, of, d in ((found, x, d_out), (expected, y, d_out))
    )
    for ours, exact in zip(*pair, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-7)
    with torch.no_grad():
        assert torch.equal(layer(x), found)


def test_a_linear_layer_that_learns_gets_its_own_gradient():
    layer = speed_up(torch.nn.Linear(40, 24).bfloat16())
    layer(torch.randn(60, 40).bfloat16()).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_without_gradients_the_modules_run_as_they_are():
    model = tiny_model("phi3").bfloat16()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        assert torch.equal(speed_up(model)(ids, use_cache=False).logits, plain)


def test_an_activation_other_than_silu_is_kept():
    model = tiny_model("llama", hidden_act="gelu").requires_grad_(False)
    twin = copy.deepcopy(model)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(speed_up(model)(ids).logits, twin(ids).logits)


def reference_norm(x, weight, epsilon):
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("has_branch", [False, True])
def test_the_norm_adds_the_gradients_of_both_paths(has_branch):
    x = torch.randn(2, 7, 48, requires_grad=True)
    branch = torch.randn(2, 7, 48, requires_grad=True) if has_branch else None
    weight = torch.randn(48)
    both = x if branch is None else x + branch
    past, out = body_functions.branch_norm(x, branch, weight, 1e-5)
    torch.testing.assert_close(out, reference_norm(both, weight, 1e-5))
    assert torch.equal(past, both)
    inputs = (x,) if branch is None else (x, branch)
    for use_past, use_out in ((True, False), (False, True), (True, True)):
        ours = (past.sin().sum() if use_past else 0) + (out.cos().sum() if use_out else 0)
        plain = (both.sin().sum() if use_past else 0) + (
            reference_norm(both, weight, 1e-5).cos().sum() if use_out else 0
        )
        found, expected = (torch.autograd.grad(v, inputs, retain_graph=True) for v in (ours, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("is_fused", [False, True])
def test_the_gated_activation_is_as_near_in_bfloat16_as_torchs(is_fused):
    both = (4 * torch.randn(21, 80)).bfloat16().requires_grad_()
    direction = torch.randn(21, 40).bfloat16()

    def gated(sides):
        gate, up = sides.chunk(2, dim=-1)
        return up * torch.nn.functional.silu(gate)

    gate, up = both.chunk(2, dim=-1)
    ours = body_functions.gated_silu(both) if is_fused else body_functions.gated_silu(gate, up)
    exact_both = both.detach().double().requires_grad_()
    exact = gated(exact_both)
    (exact_gradient,) = torch.autograd.grad(exact, exact_both, direction.double())
    plain = gated(both)
    for found, theirs, expected in (
        (ours, plain, exact),
        (*(torch.autograd.grad(out, both, direction)[0] for out in (ours, plain)), exact_gradient),
    ):
        assert (found - expected).abs().max() <= (theirs - expected).abs().max()


@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("num_turned", [8, 4])
def test_heads_are_turned_as_transformers_does(num_turned):
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    x = torch.randn(1, 11, 4 * 8, requires_grad=True)
    half = torch.randn(1, 11, num_turned // 2)
    cos, sin = (torch.cat([part, part], -1) for part in (half.cos(), half.sin()))
    q, k, v = x.view(1, 11, 4, 8).transpose(1, 2).split([2, 1, 1], dim=1)
    plain = torch.cat([*apply_rotary_pos_emb(q, k, cos, sin), v], dim=1)
    ours = torch.cat(body_functions.rotated_heads(x, (cos, sin), size=8, num_heads=2, kv_heads=1), dim=1)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    direction = torch.randn(ours.shape)
    found, expected = (torch.autograd.grad(out, x, direction)[0] for out in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
