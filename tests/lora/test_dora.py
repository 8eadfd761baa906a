"""DoRA's layer is PEFT's, forward, backward and in files, and keeps no more than a plain layer."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from peft_twins import assert_close, assert_same_work, logits, our_twin, peft_twin, trained_of
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import nn

from phinetune.base.errors import AdapterError
from phinetune.generation.mixing import MixedLayers
from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.dora import DoraLinear
from phinetune.lora.dropout import BYTE_VALUES, dropout_threshold, dropped, keep_mask
from phinetune.lora.files import load_adapter, save_adapter
from phinetune.lora.layers import LoraLinear
from phinetune.lora.peft_format import read_peft

# PEFT asks transformers for a property that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {
    "phi3": ["qkv_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "down_proj"],  # the first two have biases
    "gpt2": ["c_attn", "c_fc"],
}


def settings_for(name, **changes):
    return LoraSettings(rank=4, alpha=6, use_dora=True, target_modules=tuple(TARGETS[name]), **changes)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_logits_and_gradients_are_pefts(name, use_rslora):
    theirs = peft_twin(
        name, r=4, lora_alpha=6, target_modules=TARGETS[name], use_dora=True, use_rslora=use_rslora
    )
    model, adapter = our_twin(name, settings_for(name, use_rslora=use_rslora), theirs)
    assert any(key.endswith("lora_magnitude_vector") for key, _ in adapter.named_parameters())
    assert_same_work(model, adapter, theirs)
    assert_same_work(model.train(), adapter, theirs)


class OurMask(nn.Module):
    """Our dropout in PEFT's place: the mask of seed 3."""

    def forward(self, x):
        torch.manual_seed(3)
        threshold = dropout_threshold(0.3)
        mask = keep_mask(x, threshold)
        return x * dropped(torch.ones_like(x), mask) * (BYTE_VALUES / (BYTE_VALUES - threshold))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_dropout_takes_away_what_it_does_in_peft(name, monkeypatch):
    theirs = peft_twin(name, r=4, lora_alpha=6, target_modules=TARGETS[name], use_dora=True)
    model, adapter = our_twin(name, settings_for(name, dropout=0.3), theirs)
    for module in theirs.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = OurMask()
    own = DoraLinear.forward

    def seeded(layer, x):
        torch.manual_seed(3)
        return own(layer, x)

    monkeypatch.setattr(DoraLinear, "forward", seeded)
    plain = logits(model).detach()
    model.train(), theirs.train()
    assert (logits(model) - plain).abs().max() > 1e-2
    # What is kept is divided by 0.7: PEFT's stand-in rounds once more than ours.
    assert_same_work(model, adapter, theirs, tolerance=2e-6)


@pytest.mark.parametrize("name", TARGETS)
def test_a_fresh_adapter_answers_as_the_base(name):
    model = tiny_model(name, implementation="eager")
    expected = logits(model)
    adapter = attach(model, settings_for(name), seed=0)
    assert_close(logits(model), expected)
    with adapter.disabled():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", TARGETS)
def test_files_go_to_peft_and_back_without_a_changed_byte(name, tmp_path):
    ours, through, back = (tmp_path / part for part in ("ours", "peft", "back"))
    theirs = peft_twin(name, r=4, lora_alpha=6, target_modules=TARGETS[name], use_dora=True)
    model, adapter = our_twin(name, settings_for(name), theirs)
    for folder in (ours, back):
        folder.mkdir()
    save_adapter(adapter, ours, base_name="base", metadata={})
    peft_model = PeftModel.from_pretrained(tiny_model(name, implementation="eager"), ours).eval()
    assert_close(logits(peft_model), logits(model))
    peft_model.save_pretrained(through, save_embedding_layers=False)
    again_model = tiny_model(name, implementation="eager")
    again = load_adapter(again_model, through)
    assert again.settings.use_dora
    assert torch.equal(logits(again_model), logits(model))
    save_adapter(again, back, base_name="base", metadata={})
    files = [load_file(folder / "adapter_model.safetensors") for folder in (ours, through, back)]
    assert sum("lora_magnitude_vector" in key for key in files[0]) == len(adapter.layers)
    for key, tensor in files[0].items():
        assert torch.equal(tensor, files[1][key])
        assert torch.equal(tensor, files[2][key])
    assert files[0].keys() == files[1].keys() == files[2].keys()
    assert json.loads((ours / "adapter_config.json").read_text())["use_dora"] is True


def test_merging_is_what_the_layer_computes(tmp_path):
    theirs = peft_twin("phi3", r=4, lora_alpha=6, target_modules=TARGETS["phi3"], use_dora=True)
    model, adapter = our_twin("phi3", settings_for("phi3"), theirs)
    expected = logits(model)
    updates = adapter.updates()
    adapter.detach(model)
    for name, update in updates.items():
        layer = model.get_submodule(name)
        layer.weight.data = update.merged_OI(layer.weight)
    assert_close(logits(model), expected)


def stirred_layer(**options):
    torch.manual_seed(0)
    layer = DoraLinear(nn.Linear(12, 20), rank=3, scaling=1.7, **options)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.mul_(1.3)
    return layer


def test_lengths_follow_the_weights_in_a_model_that_answers():
    layer = stirred_layer().eval()
    x = torch.randn(5, 12)
    for change in (lambda: layer.lora_B.data.add_(1), lambda: layer.take(stirred_layer().update())):
        before = layer(x)
        with torch.no_grad():
            change()
            layer.lora_B.add_(0.5)
        after = layer(x)
        expected = x @ layer.update().merged_OI(layer.base.weight).t() + layer.base.bias
        assert (after - before).abs().max() > 1e-2
        assert_close(after, expected)


def test_nothing_of_the_outputs_size_waits_for_the_backward_pass():
    def kept(layer):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t
        ):
            layer(torch.randn(50, 12, requires_grad=True))
        return sizes

    plain = LoraLinear(nn.Linear(12, 20), rank=3, scaling=1.0, dropout=0.2)
    sizes = kept(stirred_layer(dropout=0.2))
    assert (50, 20) not in sizes
    assert sorted(sizes) == sorted([*kept(plain), (20,), (20,)])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_bfloat16_base_keeps_float32_magnitudes(dropout):
    torch.manual_seed(0)
    base = nn.Linear(40, 20).bfloat16()
    layer = DoraLinear(base, rank=3, scaling=1.7, dropout=dropout)
    exact = DoraLinear(nn.Linear(40, 20), rank=3, scaling=1.7, dropout=dropout)
    exact.base.load_state_dict(base.state_dict())
    exact._base_squares_O = layer._base_squares_O  # of the same weights
    layer.reset(torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lora_B.normal_(std=0.05)
        layer.lora_magnitude_vector.mul_(1 + 0.2 * torch.randn(20))
    exact.take(layer.update())
    x = torch.randn(64, 40).bfloat16().requires_grad_()
    y = x.detach().float().requires_grad_()
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    reference = exact(y)
    assert out.dtype == torch.bfloat16
    direction = torch.randn(64, 20)
    (out.float() * direction).sum().backward()
    (reference * direction).sum().backward()
    assert layer.lora_magnitude_vector.grad.dtype == torch.float32
    pairs = [(out, reference), (x.grad, y.grad)]
    pairs += [(a.grad, b.grad) for (_, a), (_, b) in zip(layer.trained(), exact.trained(), strict=True)]
    for ours, theirs in pairs:
        # bfloat16 has 8 bits: each rounding is up to 0.4 %, and several add up.
        assert (ours.float() - theirs).abs().max() <= 0.02 * theirs.abs().max()


def test_a_gain_between_two_bfloat16_numbers_is_not_rounded_to_one_of_them():
    layer = DoraLinear(nn.Linear(64, 64, bias=False).bfloat16(), rank=2, scaling=1.0)
    layer.reset(torch.Generator().manual_seed(0))
    x = torch.randn(4000, 64).bfloat16()
    before = layer(x).float()
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.003)  # bfloat16 has nothing between 1 and 1.0078
    growth = (layer(x).float() * before).sum() / (before * before).sum()
    assert growth.item() == pytest.approx(1.003, abs=1e-3)


def test_a_row_of_zeros_stays_one_without_nan():
    base = nn.Linear(12, 20, bias=False)
    with torch.no_grad():
        base.weight[3] = 0
    layer = DoraLinear(base, rank=2, scaling=1.0)
    layer.reset(torch.Generator().manual_seed(0))
    out = layer(torch.randn(4, 12, requires_grad=True))
    out.sum().backward()
    assert not out[:, 3].any()
    assert all(torch.isfinite(weight.grad).all() for _, weight in layer.trained())


def test_the_engine_for_many_adapters_refuses_it_with_a_way_out(tmp_path):
    adapter = attach(tiny_model("phi3"), settings_for("phi3"), seed=0)
    save_adapter(adapter, tmp_path, base_name="base", metadata={})
    with pytest.raises(AdapterError, match="DoRA") as caught:
        MixedLayers(tiny_model("phi3")).check(read_peft(tmp_path), "adapter 'x'")
    assert "adapter merge" in caught.value.do


def test_trained_weights_are_named_as_in_peft():
    theirs = peft_twin("phi3", r=2, target_modules=["o_proj"], use_dora=True)
    adapter = attach(tiny_model("phi3"), LoraSettings(use_dora=True, target_modules=("o_proj",)), seed=0)
    assert {name for name, _ in adapter.named_parameters()} == trained_of(theirs).keys()
    (row,) = adapter.coverage
    assert row.num_parameters == adapter.num_parameters == 2 * (16 * (32 + 32) + 32)
