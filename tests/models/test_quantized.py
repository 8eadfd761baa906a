"""A base in few bits is the linear layer of its dequantised weights: forward, backward, alone and adapted."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from tiny_models import ARCHITECTURES, random_rows, tiny_model
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from phinetune.base.errors import ModelError, SettingsError
from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.dropout import BYTE_VALUES, dropped, keep_mask
from phinetune.lora.files import load_adapter, save_adapter
from phinetune.lora.frozen import TiledLinear
from phinetune.lora.layers import LoraLinear
from phinetune.models import quantized as module
from phinetune.models.batch import PackedBatch
from phinetune.models.loading import load_base
from phinetune.models.loss import token_scores, trained_token_loss
from phinetune.models.quantized import BITS, QuantizedLinear, quantized

KINDS = ("int8", "nf4")
# Greatest error of a weight as a share of the largest of its block: half a step of the code.
HALF_STEP = {"int8": 0.5 / 127, "nf4": 0.5 * (1 - 0.6961928)}


def random_weight(out_features, in_features, *, seed=0):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a layer of a test has several both ways, the last ones not full."""
    monkeypatch.setattr(module, "CPU_TILE_WEIGHTS", 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (130, 200), (65, 129), (2, 7)])
def test_each_weight_is_off_by_half_a_step_at_most(kind, shape):
    weight = random_weight(*shape)
    layer = quantized(weight, None, kind, dtype=torch.float32)
    block = layer.block
    padded = torch.nn.functional.pad(weight, (0, -shape[1] % block)).view(shape[0], -1, block)
    largest = padded.abs().amax(-1).repeat_interleave(block, 1)[:, : shape[1]]
    assert layer.weight.shape == weight.shape
    assert ((layer.weight - weight).abs() <= HALF_STEP[kind] * 1.001 * largest).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_single_large_weights_survive(kind):
    weight = torch.zeros(4, 256)
    weight[1, 200] = -3.0
    assert torch.equal(quantized(weight, None, kind, dtype=torch.float32).weight, weight)


def test_nf4_is_what_bitsandbytes_gives():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight(128, 192)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    expected = functional.dequantize_4bit(codes, state)
    assert torch.equal(quantized(weight, None, "nf4", dtype=torch.float32).weight, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_put_together_are_the_weight(kind, dtype, small_tiles):
    layer = quantized(random_weight(200, 300), None, kind, dtype=dtype)
    rows, columns = list(layer.row_tiles()), list(layer.column_tiles())
    assert len(rows) > 2
    assert len(columns) > 2
    assert torch.equal(torch.cat([layer.tile(part, slice(0, 300)) for part in rows]), layer.weight)
    assert torch.equal(torch.cat([layer.tile(slice(0, 200), part) for part in columns], 1), layer.weight)
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_forward_and_gradient_are_those_of_the_dequantised_weight(kind, has_bias, small_tiles):
    bias = torch.randn(200) if has_bias else None
    layer = quantized(random_weight(200, 300), bias, kind, dtype=torch.float32)
    x = torch.randn(2, 9, 300, requires_grad=True)
    direction = torch.randn(2, 9, 200)
    ours, theirs = layer(x), linear(x, layer.weight, bias)
    torch.testing.assert_close(ours, theirs)
    (d_ours,) = torch.autograd.grad((ours * direction).sum(), x)
    (d_theirs,) = torch.autograd.grad((theirs * direction).sum(), x)
    torch.testing.assert_close(d_ours, d_theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_adapter_over_it_has_the_gradients_of_autograd(kind, dropout, small_tiles):
    base = quantized(random_weight(200, 300), torch.randn(200), kind, dtype=torch.float32)
    layer = LoraLinear(base, rank=3, scaling=1.7, dropout=dropout)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    x = torch.randn(7, 300, requires_grad=True)
    torch.manual_seed(3)
    ours = layer(x)
    torch.manual_seed(3)
    rest = x
    if dropout:
        kept = dropped(torch.ones_like(x), keep_mask(x, layer.threshold))
        rest = x * kept * (BYTE_VALUES / (BYTE_VALUES - layer.threshold))
    update = layer.scaling * linear(linear(rest, layer.lora_A), layer.lora_B)
    theirs = linear(x, base.weight, base.bias) + update
    direction = torch.randn_like(ours)
    wanted = [x, layer.lora_A, layer.lora_B]
    found = torch.autograd.grad((ours * direction).sum(), wanted)
    expected = torch.autograd.grad((theirs * direction).sum(), wanted)
    for a, b in zip((ours, *found), (theirs, *expected), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def quantized_base(tmp_path, kind="int8", name="phi3"):
    tiny_model(name).save_pretrained(tmp_path / "model")
    return load_base(str(tmp_path / "model"), device_name="cpu", dtype="float32", quantize=kind)


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian"])
def test_an_adapter_that_begins_in_the_base_begins_in_its_dequantised_weights(start, tmp_path):
    base = quantized_base(tmp_path)
    batch = PackedBatch.lay(random_rows([5, 20]))
    before = token_scores(base, batch).nll_N
    weight = base.model.get_submodule("model.layers.0.self_attn.o_proj").weight
    adapter = attach(base.model, LoraSettings(rank=2, alpha=4, init_lora_weights=start), seed=0)
    torch.testing.assert_close(token_scores(base, batch).nll_N, before)
    layer = adapter.layers["model.layers.0.self_attn.o_proj"]
    assert isinstance(layer.base, QuantizedLinear)
    if start == "pissa":
        u, sizes, v = torch.linalg.svd(weight, full_matrices=False)
        expected = (u[:, :2] * sizes[:2]) @ v[:2]
        torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, expected)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ("model.layers.0.mlp",), "target_modules": ("o_proj",)}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
    ],
)
def test_what_needs_whole_weights_is_refused_and_leaves_the_model_bare(changes, where, tmp_path):
    base = quantized_base(tmp_path, name="gpt2" if where == "bias" else "phi3")
    with pytest.raises(SettingsError) as caught:
        attach(base.model, LoraSettings(rank=2, alpha=4, **changes), seed=0)
    assert caught.value.where == where
    assert "quantize: none" in caught.value.do
    attach(base.model, LoraSettings(rank=2, alpha=4), seed=0)


def test_no_gradient_of_the_input_means_no_backward_tiles(monkeypatch):
    layer = LoraLinear(quantized(random_weight(8, 8), None, "int8", dtype=torch.float32), rank=2, scaling=1.0)
    out = layer(torch.randn(3, 8))
    monkeypatch.setattr(QuantizedLinear, "column_tiles", lambda self: pytest.fail("formed for nothing"))
    out.sum().backward()
    assert layer.lora_B.grad is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loaded_base_is_the_model_with_dequantised_weights(kind, name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "model")
    base = load_base(str(tmp_path / "model"), device_name="cpu", dtype="float32", quantize=kind)
    assert base.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    num_quantized = 0
    for path, layer in base.model.named_modules():
        if isinstance(layer, QuantizedLinear):
            original = model.get_submodule(path)
            assert layer.is_transposed == isinstance(original, Conv1D)
            with torch.no_grad():
                original.weight.copy_(layer.weight)
            num_quantized += 1
    linears = (nn.Linear, Conv1D)
    assert num_quantized == sum(isinstance(layer, linears) for layer in model.modules()) - 1  # but the head
    batch = PackedBatch.lay(random_rows([5, 40, 17]))
    expected = token_scores(with_model(base, model), batch)
    torch.testing.assert_close(token_scores(base, batch).nll_N, expected.nll_N, rtol=1e-5, atol=1e-5)


def weight_bytes(model):
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    codes = [code for layer in layers for code in layer.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*frozen, *codes))


def with_model(base, model):
    from dataclasses import replace

    return replace(base, model=model)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_full_precision_is_kept(kind, tmp_path):
    model = tiny_model("phi3", hidden_size=128, intermediate_size=256)
    model.save_pretrained(tmp_path / "model")
    plain = load_base(str(tmp_path / "model"), device_name="cpu", dtype="bfloat16")
    base = load_base(str(tmp_path / "model"), device_name="cpu", dtype="bfloat16", quantize=kind)
    layers = [layer for layer in base.model.modules() if isinstance(layer, QuantizedLinear)]
    num = sum(layer.in_features * layer.out_features for layer in layers)
    assert weight_bytes(base.model) == weight_bytes(plain.model) - 2 * num + num * BITS[kind] / 8
    for layer in layers:
        assert isinstance(layer, TiledLinear)
        assert not list(layer.parameters())
    assert base.model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trained_on_it_works_on_the_original(kind, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    base = load_base(folder, device_name="cpu", dtype="float32", quantize=kind)
    adapter = attach(base.model, LoraSettings(rank=4, alpha=8), seed=0)
    batch = PackedBatch.lay(random_rows([30, 20]))
    base.model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss, num = trained_token_loss(base, batch)
        (loss / num).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    (tmp_path / "adapter").mkdir()
    save_adapter(adapter, tmp_path / "adapter", base_name=folder, metadata={"base_sha256": base.sha256})
    original = load_base(folder, device_name="cpu", dtype="float32")
    before = token_scores(original, batch).nll_N.sum()
    load_adapter(original.model, tmp_path / "adapter", base_sha256=original.sha256)
    assert token_scores(original, batch).nll_N.sum() < 0.95 * before


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_gaps_is_refused(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    tiny_model("phi3").save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")

    def load(changed):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        return load_base(str(folder), device_name="cpu", dtype="float32", quantize=kind)

    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(ModelError, match="not complete") as caught:
        load({key: value for key, value in weights.items() if key != name})
    assert name in caught.value.why
    with pytest.raises(ModelError, match="do not fit"):
        load({**weights, name: weights[name][:, :5].contiguous()})
    with pytest.raises(ModelError, match="do not fit"):
        load({**weights, name: weights[name].to(torch.uint8)})
    with pytest.raises(ModelError):
        load({**weights, name: torch.full_like(weights[name], torch.nan)})
    load({key.removeprefix("model."): value for key, value in weights.items()})


def test_files_that_are_quantised_already_are_refused(tmp_path):
    folder = tmp_path / "model"
    tiny_model("phi3").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised already") as caught:
        load_base(str(folder), device_name="cpu", dtype="float32")
    assert "original precision" in caught.value.do


def test_a_divided_base_cannot_be_quantised():
    with pytest.raises(SettingsError, match="divided among processes"):
        load_base("demo", quantize="int8", is_sharded=True)


def test_without_its_library_nf4_says_what_to_install(monkeypatch):
    module._bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SettingsError, match="not installed") as caught:
        load_base("demo", device_name="cpu", quantize="nf4")
    assert "phinetune[quantize]" in caught.value.do
    load_base("demo", device_name="cpu", quantize="int8")


def test_the_library_is_loaded_silently_and_fetches_nothing(capfd):
    module._bitsandbytes.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        assert name in sys.modules  # once loaded it stays: its operators cannot be registered twice
    load_base("demo", device_name="cpu", quantize="nf4")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert "kernels" not in sys.modules
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.NOTSET
