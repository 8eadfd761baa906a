"""A base model is loaded whole or refused with a reason; never with random weights in a gap."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, random_rows, tiny_base, tiny_model
from transformers import AutoModelForCausalLM, GraniteConfig

from phinetune.base.errors import ModelError
from phinetune.models import attention, catalog
from phinetune.models.batch import PackedBatch
from phinetune.models.catalog import find_model, weights_sha256
from phinetune.models.loading import load_base
from phinetune.models.loss import token_scores


@pytest.fixture
def folder(tmp_path):
    return saved(tiny_model("phi3"), tmp_path / "model")


def saved(model, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def load(folder, **kwargs):
    return load_base(str(folder), device_name="cpu", **{"dtype": "float32", **kwargs})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loaded_base_answers_as_the_saved_model(name, tmp_path):
    model = tiny_model(name)
    base = load(saved(model, tmp_path / "model"))
    batch = PackedBatch.lay(random_rows([5, 40, 17]))
    expected = token_scores(tiny_base(name), batch)
    torch.testing.assert_close(token_scores(base, batch).nll_N, expected.nll_N, rtol=1e-6, atol=1e-6)
    assert base.max_length == 512
    assert base.vocab_size == 97
    assert base.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_loaded_base_is_frozen_and_evaluates(folder):
    base = load(folder)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.config._attn_implementation == attention.IMPLEMENTATION
    assert (base.name, base.folder, base.sha256) == (str(folder), folder, weights_sha256(folder))
    assert load(folder, dtype="bfloat16").model.dtype == torch.bfloat16


def test_plain_attention_ends_even_after_an_error(folder):
    base = load(folder)

    def stop():
        with base.plain_attention():
            assert base.model.config._attn_implementation == "sdpa"
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop()
    assert base.model.config._attn_implementation == attention.IMPLEMENTATION


def test_the_digest_depends_on_every_weight_and_on_nothing_else(folder):
    before = weights_sha256(folder)
    (folder / "README.md").write_text("hello")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": "x"}))
    assert weights_sha256(folder) == before
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][5, 5] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights_sha256(folder) != before


def test_an_adapter_beside_the_weights_is_not_part_of_them(folder):
    before = weights_sha256(folder)
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert weights_sha256(folder) == before


def test_the_digest_of_large_weights_is_kept_until_a_file_changes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(catalog, "LARGE_BYTES", 1)
    first = weights_sha256(folder)
    monkeypatch.setattr(catalog, "sha256_file", lambda path: pytest.fail("read again"))
    assert weights_sha256(folder) == first
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(catalog, "LARGE_BYTES", 1)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["lm_head.weight"] + 1}, folder / "model.safetensors")
    assert weights_sha256(folder) != first


def rewrite(folder, change):
    path = folder / "model.safetensors"
    weights = change(load_file(path))
    save_file(weights, path, metadata={"format": "pt"})


def reconfigure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def only_pickles(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")


def without(key):
    return lambda weights: {name: value for name, value in weights.items() if name != key}


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), ["not a model folder", "config.json is missing"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["has no weights", "download the model"]),
    "pickle only": (only_pickles, ["pytorch_model.bin is a pickle file, which is never opened"]),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 3000), ["cannot be loaded"]),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), ["cannot be loaded"]),
    "missing tensor": (
        lambda f: rewrite(f, without("model.layers.1.mlp.down_proj.weight")),
        ["weights are not complete", "1 tensors are missing", "layers.1.mlp.down_proj.weight"],
    ),
    "missing head": (
        lambda f: rewrite(f, without("lm_head.weight")),
        ["weights are not complete", "lm_head"],
    ),
    "wrong shape": (lambda f: reconfigure(f, intermediate_size=48), []),
    "unknown type": (lambda f: reconfigure(f, model_type="zebra"), ["cannot be loaded", "zebra"]),
    "not a language model": (lambda f: reconfigure(f, model_type="vit"), ["cannot be loaded"]),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), ["cannot be loaded"]),
    "config of wrong types": (
        lambda f: reconfigure(f, hidden_size="wide"),
        ["cannot be loaded", "hidden_size"],
    ),
    "config in conflict": (lambda f: reconfigure(f, num_attention_heads=5), ["cannot be loaded"]),
    "code of its own": (
        lambda f: reconfigure(f, model_type="zebra", auto_map={"AutoConfig": "evil.Config"}),
        ["cannot be loaded"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_the_reason(folder, damage):
    harm, parts = DAMAGES[damage]
    (folder / "evil.py").write_text("raise SystemExit('code of a model folder was run')")
    harm(folder)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert str(folder) in str(caught.value)
    assert caught.value.do


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "nowhere", "a/b/c", "~/x", "a\\b"])
def test_a_folder_that_is_not_there_says_what_a_model_may_be(name, tmp_path):
    with pytest.raises(ModelError, match="no model folder") as caught:
        find_model(name, root=tmp_path)
    assert "demo" in caught.value.do


def test_a_hub_name_that_is_not_here_is_not_fetched_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        find_model("nobody/nothing", root=tmp_path)


def test_a_folder_is_found_from_the_project(folder):
    assert find_model(folder.name, root=folder.parent) == folder


def test_a_model_whose_logits_are_scaled_is_refused(tmp_path):
    config = GraniteConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, logits_scaling=4.0,
    )  # fmt: skip
    torch.manual_seed(0)
    path = saved(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    with pytest.raises(ModelError, match="'granite' are not supported") as caught:
        load(path)
    assert "head" in caught.value.why


def test_nan_weights_are_refused(folder):
    def spoil(weights):
        weights["lm_head.weight"][3, 3] = float("nan")
        return weights

    rewrite(folder, spoil)
    with pytest.raises(ModelError):
        load(folder)


def test_loading_says_nothing_by_itself(folder, capfd):
    load(folder)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
