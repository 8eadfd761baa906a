"""Targets are found or refused; what is attached can be switched off, copied, restored and taken away."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, OlmoConfig, PhiConfig

from phinetune.base.errors import SettingsError
from phinetune.lora.attach import LoraSettings, attach, default_targets, linear_layers
from phinetune.lora.layers import LoraLinear


def logits(model):
    ids = torch.arange(3, 23)[None] % VOCAB
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def stirred(adapter, scale=0.1):
    """Trained-looking weights: B is no longer zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return adapter


def other_model(name):
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = {"phi": PhiConfig, "olmo": OlmoConfig}[name](**sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", [*ARCHITECTURES, "phi", "olmo"])
def test_default_targets_are_every_linear_layer_of_the_blocks(name):
    model = other_model(name) if name in ("phi", "olmo") else tiny_model(name)
    head = model.get_output_embeddings()
    blocks = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    expected = [module for module in blocks if module is not head]
    adapter = attach(model, LoraSettings(rank=2), seed=0)
    assert [layer.base for layer in adapter.layers.values()] == expected
    assert len(expected) >= 8
    assert model.get_output_embeddings() is head
    assert not isinstance(head, LoraLinear)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in adapter.named_parameters()}


def test_a_target_that_matches_nothing_names_the_nearest():
    model = tiny_model("llama")
    with pytest.raises(SettingsError, match="'qproj' matches no linear layer") as caught:
        attach(model, LoraSettings(target_modules=("q_proj", "qproj")), seed=0)
    assert caught.value.do == "write 'q_proj'"
    assert caught.value.where == "lora_target_modules"
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("asked", "fused"),
    [("q_proj", "qkv_proj"), ("k_proj", "qkv_proj"), ("v_proj", "qkv_proj"), ("up_proj", "gate_up_proj")],
)
def test_separate_names_on_a_fused_model_suggest_the_fused_one(asked, fused):
    with pytest.raises(SettingsError) as caught:
        attach(tiny_model("phi3"), LoraSettings(target_modules=(asked,)), seed=0)
    assert caught.value.do == f"write '{fused}'"


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "*norm*", "model.layers.0", ""])
def test_what_is_no_linear_layer_of_the_blocks_is_refused(target):
    with pytest.raises(SettingsError, match="matches no linear layer"):
        attach(tiny_model("phi3"), LoraSettings(target_modules=(target,)), seed=0)


@pytest.mark.parametrize(
    ("target", "num_layers"),
    [
        ("qkv_proj", 2),
        ("model.layers.1.self_attn.qkv_proj", 1),
        ("self_attn.qkv_proj", 2),
        ("*.self_attn.*", 4),
        ("*layers.1*", 4),
        ("*", 8),
    ],
)
def test_a_target_is_a_name_a_path_or_a_pattern(target, num_layers):
    adapter = attach(tiny_model("phi3"), LoraSettings(target_modules=(target,)), seed=0)
    assert len(adapter.layers) == num_layers


def test_no_layer_is_attached_twice_by_overlapping_targets():
    adapter = attach(tiny_model("phi3"), LoraSettings(target_modules=("*", "qkv_proj", "o_proj")), seed=0)
    assert len(adapter.layers) == 8
    assert not any(isinstance(layer.base, LoraLinear) for layer in adapter.layers.values())


def test_the_coverage_table_says_what_is_trained():
    adapter = attach(tiny_model("phi4-mini"), LoraSettings(rank=4), seed=0)
    rows = {row.target: (row.num_layers, row.in_features, row.out_features) for row in adapter.coverage}
    assert rows == {
        "qkv_proj": (2, 32, 64), "o_proj": (2, 32, 32), "gate_up_proj": (2, 32, 128), "down_proj": (2, 64, 32)
    }  # fmt: skip
    assert sum(row.num_parameters for row in adapter.coverage) == adapter.num_parameters
    expected = 2 * 4 * ((32 + 64) + (32 + 32) + (32 + 128) + (64 + 32))
    assert adapter.num_parameters == expected == sum(p.numel() for p in adapter.parameters())
    assert adapter.target_modules == ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_disabled_gives_exactly_the_bases_logits(name):
    model = tiny_model(name)
    expected = logits(model)
    adapter = attach(model, LoraSettings(rank=4), seed=0)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    stirred(adapter)
    changed = logits(model)
    assert (changed - expected).abs().max() > 1e-2
    with adapter.disabled():
        assert torch.equal(logits(model), expected)
        with adapter.disabled():
            pass
        assert torch.equal(logits(model), expected), "an inner block must not switch the adapter on"
    assert torch.equal(logits(model), changed)


def test_an_error_inside_disabled_switches_the_adapter_on_again():
    adapter = attach(tiny_model("phi3"), LoraSettings(rank=4), seed=0)

    def stop():
        with adapter.disabled():
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop()
    assert all(layer.is_enabled for layer in adapter.layers.values())


def test_detach_puts_every_frozen_layer_back():
    model = tiny_model("gpt2")
    before = dict(model.named_modules())
    expected = logits(model)
    stirred(attach(model, LoraSettings(rank=4), seed=0)).detach(model)
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())
    assert torch.equal(logits(model), expected)


def test_a_snapshot_restores_the_weights_and_is_a_copy():
    adapter = stirred(attach(tiny_model("phi3"), LoraSettings(rank=4), seed=0))
    weights = adapter.snapshot()
    kept = {name: weight.clone() for name, weight in weights.items()}
    stirred(adapter)
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    assert not torch.equal(
        adapter.snapshot()["model.layers.0.self_attn.qkv_proj.lora_A"],
        weights["model.layers.0.self_attn.qkv_proj.lora_A"],
    )
    adapter.restore(weights)
    assert all(torch.equal(weight, kept[name]) for name, weight in adapter.named_parameters())


def test_initial_weights_depend_on_seed_and_name_alone():
    def initial(seed, targets=None):
        return attach(tiny_model("llama"), LoraSettings(target_modules=targets), seed=seed).snapshot()

    all_of_them, again, other = initial(1), initial(1), initial(2)
    few = initial(1, ("v_proj", "q_proj"))
    assert len(few) == 8
    assert all(torch.equal(weight, all_of_them[name]) for name, weight in few.items())
    assert all(torch.equal(weight, again[name]) for name, weight in all_of_them.items())
    a_names = [name for name in all_of_them if name.endswith("lora_A")]
    assert not any(torch.equal(all_of_them[name], other[name]) for name in a_names)
    assert len({all_of_them[name].flatten()[:4].sum().item() for name in a_names}) == len(a_names)


def test_the_order_of_the_targets_does_not_matter():
    one = attach(tiny_model("llama"), LoraSettings(target_modules=("v_proj", "q_proj")), seed=0)
    two = attach(tiny_model("llama"), LoraSettings(target_modules=("q_proj", "v_proj")), seed=0)
    assert list(one.layers) == list(two.layers)


def test_a_model_that_has_an_adapter_gets_no_second_one():
    model = tiny_model("phi3")
    attach(model, LoraSettings(rank=2), seed=0)
    with pytest.raises(SettingsError, match="already has an adapter"):
        attach(model, LoraSettings(rank=2), seed=0)


@pytest.mark.parametrize("is_training", [True, False])
def test_dropout_is_on_in_a_training_model_alone(is_training):
    model = tiny_model("phi3").train(is_training)
    stirred(attach(model, LoraSettings(rank=4, dropout=0.5), seed=0))
    torch.manual_seed(0)
    assert torch.equal(logits(model), logits(model)) != is_training


def test_unknown_architectures_are_looked_at():
    model = other_model("olmo")
    assert set(default_targets(model)) == {name.rsplit(".", 1)[-1] for name in linear_layers(model)}
