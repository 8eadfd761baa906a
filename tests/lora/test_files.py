"""An adapter folder is read whole or refused with a reason; a refused one leaves the model as it was."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from phinetune.base.errors import AdapterError, IncompatibleLowRankAdapter, SettingsError, SpaceError
from phinetune.base.files import committed_dir
from phinetune.lora import files, tensor_file
from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.files import load_adapter, save_adapter
from phinetune.lora.layers import LoraLinear

KEY = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.weight"
MAGNITUDE = KEY.replace("lora_A.weight", "lora_magnitude_vector")


@pytest.fixture
def folder(tmp_path):
    model = tiny_model("phi3")
    adapter = attach(model, LoraSettings(rank=4, alpha=8.0, dropout=0.25), seed=0)
    adapter.reset(3)
    metadata = {"base_sha256": "b" * 64, "base_name": "the base", "step": "12"}
    save_adapter(adapter, tmp_path, base_name="the base", metadata=metadata)
    return tmp_path


def test_what_was_saved_comes_back(folder):
    model = tiny_model("phi3")
    adapter = load_adapter(model, folder, base_sha256="b" * 64)
    expected = attach(tiny_model("phi3"), LoraSettings(rank=4), seed=3).snapshot()
    assert adapter.snapshot().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter.snapshot().items())
    assert (adapter.settings.rank, adapter.settings.alpha, adapter.settings.dropout) == (4, 8.0, 0.25)
    assert all(layer.scaling == 2.0 for layer in adapter.layers.values())
    assert files.read_metadata(folder)["step"] == "12"


def test_an_adapter_of_a_few_layers_is_attached_to_these_alone(tmp_path):
    settings = LoraSettings(rank=2, target_modules=("model.layers.1.self_attn.o_proj",))
    save_adapter(attach(tiny_model("phi3"), settings, seed=0), tmp_path, base_name="x", metadata={})
    adapter = load_adapter(tiny_model("phi3"), tmp_path)
    assert list(adapter.layers) == ["model.layers.1.self_attn.o_proj"]


def test_the_config_names_what_peft_needs(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.25)
    assert config["base_model_name_or_path"] == "the base"
    assert config["fan_in_fan_out"] is False


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def spoil(value):
    def change(weights):
        weights[KEY][2, 3] = value

    return change


def renamed(weights):
    for key in list(weights):
        weights[key.replace("qkv_proj", "q_proj")] = weights.pop(key)


def without_config_key(key):
    def change(folder):
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        del config[key]
        path.write_text(json.dumps(config))

    return change


FAULTS = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter"),
    "config cut": (lambda f: os.truncate(f / "adapter_config.json", 50), "config cannot be read"),
    "config a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), "config cannot be read"),
    "config not text": (lambda f: (f / "adapter_config.json").write_bytes(b"\xff"), "config cannot be read"),
    "no rank": (without_config_key("r"), "lacks a usable value"),
    "no alpha": (without_config_key("lora_alpha"), "lacks a usable value"),
    "rank 0": (lambda f: edit_config(f, r=0), "lacks a usable value"),
    "alpha NaN": (lambda f: edit_config(f, lora_alpha=float("nan")), "lacks a usable value"),
    "alpha a word": (lambda f: edit_config(f, lora_alpha="much"), "lacks a usable value"),
    "other type": (lambda f: edit_config(f, peft_type="IA3"), "of type 'IA3'"),
    "no type": (without_config_key("peft_type"), "of type None"),
    "DoRA without magnitudes": (lambda f: edit_config(f, use_dora=True), "has no magnitude"),
    "rank pattern of one layer": (lambda f: edit_config(f, rank_pattern={"o_proj": 3}), "wrong shape"),
    "rank pattern a regex": (lambda f: edit_config(f, rank_pattern={"(a+)+x": 4}), "regular expression"),
    "rank pattern a list": (lambda f: edit_config(f, rank_pattern=[3]), "lacks a usable value"),
    "alpha pattern NaN": (lambda f: edit_config(f, alpha_pattern={"q": float("nan")}), "usable value"),
    "modules to save": (lambda f: edit_config(f, modules_to_save=["lm_head"]), "no weights of 'lm_head'"),
    "activated LoRA": (lambda f: edit_config(f, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "PiSSA": (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), "started with 'pissa_niter_4'"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "there are no adapter weights"),
    "weights cut": (lambda f: os.truncate(f / "adapter_model.safetensors", 5000), "weights cannot be read"),
    "weights empty": (lambda f: os.truncate(f / "adapter_model.safetensors", 0), "weights cannot be read"),
    "no tensors": (lambda f: edit_weights(f, dict.clear), "holds no weights"),
    "NaN": (lambda f: edit_weights(f, spoil(float("nan"))), "NaN or infinite"),
    "infinite": (lambda f: edit_weights(f, spoil(float("-inf"))), "NaN or infinite"),
    "A missing": (lambda f: edit_weights(f, lambda w: w.pop(KEY)), "has no lora_A"),
    "B missing": (lambda f: edit_weights(f, lambda w: w.pop(KEY.replace("_A", "_B"))), "has no lora_B"),
    "extra tensor": (lambda f: edit_weights(f, lambda w: w.update(x=torch.ones(1))), "unknown meaning, 'x'"),
    "other rank": (lambda f: edit_config(f, r=8), "wrong shape"),
    "no matrix": (lambda f: edit_weights(f, lambda w: w.update({KEY: torch.ones(4)})), "do not fit"),
    "DoRA tensor": (lambda f: edit_weights(f, lambda w: w.update({MAGNITUDE: torch.ones(1)})), "not say"),
}  # fmt: skip
OTHER_BASE = {
    "bias": (lambda f: edit_config(f, bias="all"), "no biases to train"),
    "other names": (lambda f: edit_weights(f, renamed), "does not have"),
    "other shape": (lambda f: edit_weights(f, lambda w: w.update({KEY: torch.ones(4, 33)})), "wrong shape"),
}


def assert_refused(folder, error, match, **kwargs):
    model = tiny_model("phi3")
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=match) as caught:
        load_adapter(model, folder, **kwargs)
    assert str(folder) in caught.value.where
    assert caught.value.do
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    return caught.value


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unsound_folder_is_refused(folder, fault):
    damage, match = FAULTS[fault]
    damage(folder)
    error = assert_refused(folder, AdapterError, match)
    assert not isinstance(error, IncompatibleLowRankAdapter)


@pytest.mark.parametrize("fault", OTHER_BASE)
def test_an_adapter_of_another_base_is_told_apart(folder, fault):
    damage, match = OTHER_BASE[fault]
    damage(folder)
    assert_refused(folder, IncompatibleLowRankAdapter, match)


def test_a_base_of_other_weights_is_refused(folder):
    error = assert_refused(folder, IncompatibleLowRankAdapter, "another base model", base_sha256="c" * 64)
    assert "bbbbbbbbbbbb" in error.why
    assert "cccccccccccc" in error.why
    assert "the base" in error.do
    load_adapter(tiny_model("phi3"), folder)  # without a hash the shapes must do


def test_a_smaller_base_is_refused(folder):
    model = tiny_model("phi3", num_hidden_layers=1)
    with pytest.raises(IncompatibleLowRankAdapter, match=r"layers\.1"):
        load_adapter(model, folder)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_a_second_adapter_on_top_is_refused(folder):
    model = tiny_model("phi3")
    load_adapter(model, folder)
    with pytest.raises(SettingsError, match="already has an adapter"):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    "off",
    [
        {},
        {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}},
        {"layers_to_transform": None, "layers_pattern": None, "revision": None, "eva_config": None},
        {"modules_to_save": [], "lora_bias": False, "trainable_token_indices": None, "megatron_config": None},
    ],
)
def test_options_that_are_off_or_missing_do_no_harm(folder, off):
    edit_config(folder, unknown_key_of_a_later_version={"a": 1}, init_lora_weights="gaussian", **off)
    without_config_key("modules_to_save")(folder) if not off else None
    assert len(load_adapter(tiny_model("phi3"), folder).layers) == 8


def test_a_disk_that_fills_up_while_weights_are_written_is_said(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        # As safetensors words it.
        raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")

    adapter = load_adapter(tiny_model("phi3"), folder)
    monkeypatch.setattr(tensor_file, "save_file", full)

    def save():
        with committed_dir(tmp_path / "adapter") as temporary:
            save_adapter(adapter, temporary, base_name="x", metadata={})

    with pytest.raises(SpaceError, match="disk is full"):
        save()
    assert not (tmp_path / "adapter").exists()
