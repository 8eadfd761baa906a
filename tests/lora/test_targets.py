"""Layers are chosen by name, pattern and block as PEFT chooses them; what means none is refused."""

from __future__ import annotations

import pytest
from peft_twins import assert_same_work, our_twin, peft_twin, trained_of
from tiny_models import tiny_model

from phinetune.base.errors import SettingsError
from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.files import load_adapter, save_adapter
from phinetune.lora.targets import block_of

# PEFT asks transformers for a property that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("pattern", [None, "layers", ["h", "layers"]])
@pytest.mark.parametrize("numbers", [[1], [0, 1], 1])
def test_the_blocks_that_are_adapted_are_pefts(numbers, pattern):
    theirs = peft_twin(
        "llama", r=2, target_modules=TARGETS, layers_to_transform=numbers, layers_pattern=pattern
    )
    settings = LoraSettings(
        rank=2,
        alpha=8,
        target_modules=tuple(TARGETS),
        layers_to_transform=tuple([numbers] if isinstance(numbers, int) else numbers),
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern or ()),
    )
    model, adapter = our_twin("llama", settings, theirs)
    assert_same_work(model, adapter, theirs)
    assert len(adapter.layers) == 3 * (2 if numbers == [0, 1] else 1)


@pytest.mark.parametrize(
    "variant",
    [
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 1}},
        {"alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 2.5}},
    ],
)
def test_scales_and_ranks_are_pefts(variant):
    theirs = peft_twin("llama", r=4, lora_alpha=6, target_modules=TARGETS, **variant)
    settings = LoraSettings(rank=4, alpha=6, target_modules=tuple(TARGETS), **variant)
    assert_same_work(*our_twin("llama", settings, theirs), theirs)


def test_an_adapter_of_some_blocks_goes_to_peft_and_back(tmp_path):
    from peft import PeftModel

    settings = LoraSettings(rank=2, target_modules=("q_proj",), layers_to_transform=(1,))
    save_adapter(attach(tiny_model("llama"), settings, seed=0), tmp_path, base_name="x", metadata={})
    theirs = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert {key.rpartition(".")[0] for key in trained_of(theirs)} == {"model.layers.1.self_attn.q_proj"}
    back = load_adapter(tiny_model("llama"), tmp_path)
    assert list(back.layers) == ["model.layers.1.self_attn.q_proj"]
    assert back.settings.layers_to_transform == (1,)


def test_an_adapter_for_single_layers_ignores_the_blocks_of_its_config(tmp_path):
    # As in PEFT: a whole path means its layer, whatever layers_to_transform says.
    path = "model.layers.0.self_attn.q_proj"
    settings = LoraSettings(rank=2, target_modules=(path, "v_proj"), layers_to_transform=(1,))
    adapter = attach(tiny_model("llama"), settings, seed=0)
    assert list(adapter.layers) == [path, "model.layers.1.self_attn.v_proj"]
    save_adapter(adapter, tmp_path, base_name="x", metadata={})
    assert list(load_adapter(tiny_model("llama"), tmp_path).layers) == list(adapter.layers)


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        ({"layers_to_transform": (0, 7)}, "layers_to_transform", "names block 7"),
        ({"layers_to_transform": (0,), "layers_pattern": ("h",)}, "layers_to_transform", "names block 0"),
        ({"rank_pattern": {"downproj": 2}}, "rank_pattern", "fits no adapted layer"),
        ({"alpha_pattern": {"o_proj": 2.0}, "target_modules": ("q_proj",)}, "alpha_pattern", "'o_proj'"),
        ({"rank_pattern": {".*q_proj": 2}}, "rank_pattern", "fits no adapted layer"),
        (
            {"layers_to_transform": (0,), "target_modules": ("*.layers.1.*",)},
            "layers_to_transform",
            "no targeted layer is in the blocks",
        ),
    ],
)
def test_what_means_no_layer_is_refused(settings, where, what):
    model = tiny_model("llama")
    with pytest.raises(SettingsError, match=what) as caught:
        attach(model, LoraSettings(**settings), seed=0)
    assert caught.value.where == where
    assert caught.value.do
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "pattern", "number"),
    [
        ("model.layers.3.mlp.down_proj", (), 3),
        ("transformer.h.11.attn.c_attn", (), 11),
        ("transformer.h.11.attn.c_attn", ("h",), 11),
        ("model.layers.1.experts.7.w1", (), 1),
        ("model.layers.1.experts.7.w1", ("experts",), 7),
        ("lm_head", (), None),
        ("model.layers.x.q", (), None),
    ],
)
def test_the_number_of_a_block(name, pattern, number):
    assert block_of(name, pattern) == number
