"""Separate and fused projections hold the same update; adapters add up to what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_up_adapters import logits, made_up, same_tensors
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from tiny_models import tiny_model

from phinetune.base.errors import AdapterError
from phinetune.lora.combining import concatenated, linear, reranked
from phinetune.lora.files import load_weights
from phinetune.lora.fusing import fuse, split
from phinetune.lora.peft_format import peft_tensors
from phinetune.lora.weights import last

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# tiny Phi-4-mini: 4 heads of 8, 2 of them for keys and values; tiny Llama is shaped the same.
SIZES = {"qkv_proj": (32, 16, 16), "gate_up_proj": (64, 64)}


def deltas(weights):
    return {name: update.delta_OI() for name, update in weights.updates.items()}


def fused_deltas(weights):
    """What the fused layers' updates must be, from the separate ones."""
    rows = {}
    for name, delta in deltas(weights).items():
        path = name.removesuffix(last(name))
        fused = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj", "g": "gate_up_proj", "u": "gate_up_proj"}
        key = path + (
            fused[last(name)[0]] if last(name)[0] in fused and last(name) != "o_proj" else last(name)
        )
        rows.setdefault(key, []).append(delta)
    return {key: torch.cat(parts) for key, parts in rows.items()}


def test_fused_is_the_same_update_and_splits_into_the_very_same_tensors():
    separate = made_up("llama", rank=3, alpha=6)
    fused = fuse(separate, {}, where="x")
    expected = fused_deltas(separate)
    assert fused.updates.keys() == expected.keys()
    for name, delta in deltas(fused).items():
        torch.testing.assert_close(delta, expected[name], rtol=0, atol=1e-7)
    assert fused.settings.rank_of("model.layers.0.self_attn.qkv_proj") == 9
    assert fused.settings.rank_of("model.layers.0.self_attn.o_proj") == 3
    assert same_tensors(split(fused, SIZES, where="x"), separate)


def test_split_is_the_same_update_and_fuses_into_the_very_same_tensors():
    fused = made_up("phi4-mini")
    separate = split(fused, SIZES, where="x")
    assert {last(name) for name in separate.updates} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    for name, delta in fused_deltas(separate).items():
        torch.testing.assert_close(delta, fused.updates[name].delta_OI(), rtol=0, atol=1e-7)
    assert same_tensors(fuse(separate, SIZES, where="x"), fused)


def separate_twin(fused_model):
    """The Llama that computes what a tiny Phi-3 of grouped heads computes, with separate projections."""
    weights = {}
    for key, value in fused_model.state_dict().items():
        name = next((fused for fused in SIZES if fused in key), "")
        parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        blocks = value.split(SIZES[name]) if name else [value]
        for part, block in zip(parts.get(name, [""]), blocks, strict=True):
            weights[key.replace(name, part)] = block
    twin = tiny_model("llama", rms_norm_eps=fused_model.config.rms_norm_eps)
    twin.load_state_dict(weights)
    return twin


def answers(model, weights):
    load_weights(model, weights, where="a test")
    return logits(model)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"qkv_proj": 3.0}}])
def test_fused_and_split_adapters_give_the_same_logits_on_twin_models(options):
    fused_base = tiny_model("phi3", num_key_value_heads=2)
    plain = logits(fused_base)
    torch.testing.assert_close(logits(separate_twin(fused_base)), plain, rtol=1e-5, atol=1e-5)
    fused = made_up("phi3", num_key_value_heads=2, **options)
    expected = answers(tiny_model("phi3", num_key_value_heads=2), fused)
    assert (expected - plain).abs().max() > 1e-2
    separate = split(fused, SIZES, where="x")
    torch.testing.assert_close(answers(separate_twin(fused_base), separate), expected, rtol=1e-5, atol=1e-5)
    again = answers(tiny_model("phi3", num_key_value_heads=2), fuse(separate, SIZES, where="x"))
    assert torch.equal(again, expected)


@pytest.mark.parametrize("options", [{}, {"alpha_pattern": {"v_proj": 3.0}, "rank_pattern": {"q_proj": 7}}])
def test_an_adapter_of_separate_projections_answers_the_same_when_fused_and_folded(options):
    fused_base = tiny_model("phi3", num_key_value_heads=2)
    separate = made_up("llama", **options)
    expected = answers(separate_twin(fused_base), separate)
    assert (expected - logits(fused_base)).abs().max() > 1e-2
    fused = fuse(separate, SIZES, where="x").folded()
    assert not fused.settings.alpha_pattern, "the scale is in B"
    torch.testing.assert_close(
        answers(tiny_model("phi3", num_key_value_heads=2), fused), expected, rtol=1e-5, atol=1e-5
    )


def test_parts_without_an_update_and_parts_of_other_scale_are_fused():
    settings = {
        "targets": ("q_proj", "v_proj"),
        "alpha_pattern": {"v_proj": 3.0},
        "rank_pattern": {"v_proj": 2},
    }
    separate = made_up("llama", **settings)
    fused = fuse(separate, SIZES, where="x")
    for name, update in fused.updates.items():
        parts = [separate.updates[name.replace("qkv", p)].delta_OI() for p in "qv"]
        expected = torch.cat([parts[0], torch.zeros(16, 32), parts[1]])
        torch.testing.assert_close(update.delta_OI(), expected, rtol=0, atol=1e-7)
    back = split(fused, SIZES, where="x")
    assert back.updates.keys() == separate.updates.keys()
    with pytest.raises(AdapterError, match="sizes of the parts") as caught:
        fuse(separate, {}, where="x")
    assert "--base" in caught.value.do


def test_dora_is_fused_and_split_row_by_row():
    plain = made_up("llama")
    updates = {n: replace(u, magnitude_O=torch.rand(u.out_features) + 1) for n, u in plain.updates.items()}
    dora = plain.with_updates(updates)
    fused = fuse(dora, SIZES, where="x")
    weights = {n: torch.randn(u.out_features, u.in_features) for n, u in dora.updates.items()}
    for name, update in fused.updates.items():
        if last(name) == "qkv_proj":
            names = [name.replace("qkv", part) for part in "qkv"]
            expected = torch.cat([dora.updates[n].merged_OI(weights[n]) for n in names])
            merged = update.merged_OI(torch.cat([weights[n] for n in names]))
            torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
    assert same_tensors(split(fused, SIZES, where="x"), dora)
    some = {n: u if "v_proj" in n else replace(u, magnitude_O=None) for n, u in updates.items()}
    with pytest.raises(AdapterError, match="DoRA is on some of its parts"):
        fuse(plain.with_updates(some), SIZES, where="x")


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(AdapterError, match="sizes of the parts"):
        split(made_up("phi4-mini"), {"qkv_proj": (32, 32, 32), "gate_up_proj": (64, 64)}, where="x")
    with pytest.raises(AdapterError, match="do not fit each other"):
        fuse(made_up("llama"), {"qkv_proj": (16, 32, 16), "gate_up_proj": (64, 64)}, where="x")


def test_an_untrained_adapter_keeps_its_layers_when_split():
    weights = made_up("phi4-mini")
    zero = weights.with_updates(
        {n: replace(u, b_OR=torch.zeros_like(u.b_OR)) for n, u in weights.updates.items()}
    )
    assert len(split(zero, SIZES, where="x").updates) == 14


def peft_combined(adapters, factors, method, **options):
    """The same sum, made by PEFT."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv_proj", "o_proj"])
    model = get_peft_model(tiny_model("phi3"), config, adapter_name="a0")
    for number, adapter in enumerate(adapters):
        if number:
            model.add_adapter(f"a{number}", config)
        set_peft_model_state_dict(model, peft_tensors(adapter), adapter_name=f"a{number}")
    names = [f"a{number}" for number in range(len(adapters))]
    model.add_weighted_adapter(names, factors, "sum", combination_type=method, **options)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("sum")
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.mark.parametrize("factors", [[0.7, 0.4], [1.0, -0.5], [-2.0, -0.1]])
@pytest.mark.parametrize(("method", "ours"), [("cat", concatenated), ("linear", linear)])
def test_adapters_are_added_as_peft_adds_them(method, ours, factors):
    adapters = [made_up("phi3", targets=("qkv_proj", "o_proj"), seed=seed) for seed in (0, 1)]
    expected = peft_combined(adapters, factors, method)
    found = deltas(ours(adapters, factors))
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factors", [[0.7, 0.4], [1.0, -0.5]])
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_a_sum_cut_to_a_rank_is_pefts_svd(rank, factors):
    adapters = [made_up("phi3", targets=("qkv_proj", "o_proj"), seed=seed) for seed in (0, 1)]
    expected = peft_combined(adapters, factors, "svd", svd_rank=rank)
    found = deltas(reranked(concatenated(adapters, factors), rank)[0])
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-6)


def test_concatenation_is_the_exact_sum_of_different_ranks_and_layers():
    one, two = made_up("phi3", rank=2), made_up("phi3", rank=3, targets=("o_proj",), seed=1)
    total = concatenated([one, two], [1.0, -0.5])
    for name, update in total.updates.items():
        expected = one.updates[name].delta_OI()
        if name in two.updates:
            expected = expected - 0.5 * two.updates[name].delta_OI()
        torch.testing.assert_close(update.delta_OI(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("add", [concatenated, linear])
def test_a_sum_belongs_to_the_base_and_to_no_run(add):
    nameless = replace(made_up("phi3"), metadata={"run_id": "a", "step": "3"}, base_name="")
    other = replace(
        made_up("phi3", seed=1), metadata={"base_sha256": "b" * 64, "run_id": "b", "lineage": "[]"}
    )
    total = add([nameless, other], [1.0, 1.0])
    assert total.metadata == {"base_sha256": "b" * 64}
    assert total.base_name == "the base"


def test_a_cut_to_a_rank_is_the_best_there_is_and_says_what_it_loses():
    weights = concatenated([made_up("phi3", seed=seed) for seed in range(3)], [1.0, 1.0, 1.0])
    cut, losses = reranked(weights, 4)
    for name, update in cut.updates.items():
        full = weights.updates[name].delta_OI()
        sizes = torch.linalg.svdvals(full)
        lost = torch.linalg.norm(full - update.delta_OI())
        torch.testing.assert_close(lost, sizes[4:].norm(), rtol=1e-3, atol=1e-5)
        assert losses[name] == pytest.approx(float(sizes[4:].norm() / sizes.norm()), rel=1e-3)
        assert update.rank == 4
    whole, losses = reranked(weights, 12)
    assert max(losses.values()) < 1e-6
    for name, update in whole.updates.items():
        torch.testing.assert_close(update.delta_OI(), weights.updates[name].delta_OI(), rtol=0, atol=1e-6)


def test_adapters_that_do_not_belong_together_are_refused():
    one, two = made_up("phi3"), made_up("phi3", rank=2)
    with pytest.raises(AdapterError, match="combined linearly"):
        linear([one, two], [1.0, 1.0])
    with pytest.raises(AdapterError, match="one factor"):
        concatenated([one, two], [1.0])
    with pytest.raises(AdapterError, match="different bases"):
        concatenated([one, replace(two, metadata={"base_sha256": "c" * 64})], [1.0, 1.0])
    with pytest.raises(AdapterError, match="different shapes"):
        concatenated([one, made_up("phi4-mini")], [1.0, 1.0])
