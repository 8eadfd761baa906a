"""Every form of an adapter comes back as it was; a faulty file gives an error and leaves nothing behind."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace

import loralib
import pytest
import torch
from loralib_layers import stirred
from made_up_adapters import logits, logits_with, made_up, same_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn

import phinetune.lora as ours
from phinetune.base.errors import AdapterError, UserError
from phinetune.lora.forms import FORMS, Told, form_of, read_adapter, write_adapter
from phinetune.lora.loralib_format import MergedParts, from_loralib
from phinetune.lora.torch_archive import read_torch_archive, write_torch_archive
from phinetune.lora.weights import described

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NAMES = {"peft": "adapter", "single": "x.safetensors", "loralib": "x.pt", "mlx": "mlx"}
TOLD = Told(alpha=8.0)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_byte_for_byte(tmp_path, form):
    weights = made_up("phi3")
    said = write_adapter(weights, tmp_path / NAMES[form], form)
    assert said == ("lora_alpha=8" if form == "loralib" else "")
    assert form_of(tmp_path / NAMES[form]) == form
    back = read_adapter(tmp_path / NAMES[form], TOLD)
    assert same_tensors(weights, back)
    if form != "loralib":
        assert back.base_name == "the base"
        assert back.metadata["base_sha256"] == "b" * 64
    assert torch.equal(logits_with(weights), logits_with(back))
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[form]]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_overwritten(tmp_path, form):
    (tmp_path / NAMES[form]).write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        write_adapter(made_up(), tmp_path / NAMES[form], form)
    assert (tmp_path / NAMES[form]).read_text() == "mine"


VARIED = {
    "rsLoRA": {"use_rslora": True},
    "ranks": {"rank_pattern": {"o_proj": 2, "^model.layers.0.mlp.down_proj": 6}},
    "alphas": {"alpha_pattern": {"qkv_proj": 3.0}},
    "all": {
        "use_rslora": True,
        "rank_pattern": {"qkv_proj": 8},
        "alpha_pattern": {"layers.1.self_attn.o_proj": 5},
    },
}


@pytest.mark.parametrize("variant", VARIED)
@pytest.mark.parametrize("form", FORMS)
def test_ranks_and_scales_of_single_layers_live_in_every_form(tmp_path, form, variant):
    weights = made_up("phi3", **VARIED[variant])
    assert len({(u.rank, u.scaling) for u in weights.updates.values()}) > 1 or variant == "rsLoRA"
    said = write_adapter(weights, tmp_path / NAMES[form], form)
    told = Told(alpha=float(said.removeprefix("lora_alpha=").split(",")[0])) if said else None
    back = read_adapter(tmp_path / NAMES[form], told)
    torch.testing.assert_close(logits_with(back), logits_with(weights), rtol=0, atol=2e-5)
    if form in ("peft", "single"):
        assert same_tensors(weights, back)
        assert back.settings.use_rslora == weights.settings.use_rslora


@pytest.mark.parametrize("variant", VARIED)
def test_peft_reads_ranks_and_scales_of_single_layers_as_we_do(tmp_path, variant):
    weights = made_up("phi3", **VARIED[variant])
    for number, adapter in enumerate((weights, weights.folded(), weights.with_updates(weights.updates))):
        write_adapter(adapter, tmp_path / str(number), "peft")
        theirs = PeftModel.from_pretrained(tiny_model("phi3"), tmp_path / str(number)).eval()
        torch.testing.assert_close(logits(theirs), logits_with(weights), rtol=1e-6, atol=2e-5)
    config = json.loads((tmp_path / "1" / "adapter_config.json").read_text())
    assert not {"alpha_pattern", "use_rslora"} & config.keys()


@pytest.mark.parametrize("variant", VARIED)
def test_we_read_ranks_and_scales_of_single_layers_as_peft(tmp_path, variant):
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["qkv_proj", "o_proj", "down_proj"],
        init_lora_weights=False,
        **VARIED[variant],
    )
    theirs = get_peft_model(tiny_model("phi3"), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    found = read_adapter(tmp_path / "a")
    torch.testing.assert_close(logits_with(found), logits(theirs), rtol=1e-6, atol=2e-5)
    write_adapter(found, tmp_path / "b", "peft")
    files = [load_file(tmp_path / part / "adapter_model.safetensors") for part in "ab"]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())


def test_dora_comes_back_byte_for_byte_and_answers_as_in_peft(tmp_path):
    torch.manual_seed(0)
    base = tiny_model("phi3")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["qkv_proj", "o_proj"], use_dora=True, init_lora_weights=False
    )
    theirs = get_peft_model(tiny_model("phi3"), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.3)
    theirs.save_pretrained(tmp_path / "a")
    found = read_adapter(tmp_path / "a")
    assert found.uses_dora
    write_adapter(found, tmp_path / "b", "peft")
    files = [load_file(tmp_path / part / "adapter_model.safetensors") for part in "ab"]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())
    with torch.no_grad():
        for name, update in found.updates.items():
            weight = base.get_submodule(name).weight
            weight.copy_(update.merged_OI(weight))
    torch.testing.assert_close(logits(base), logits(theirs), rtol=1e-5, atol=2e-5)
    for form in ("loralib", "mlx"):
        with pytest.raises(AdapterError, match="DoRA"):
            write_adapter(found, tmp_path / NAMES[form], form)
        assert not (tmp_path / NAMES[form]).exists()
    torch.testing.assert_close(logits_with(found), logits(theirs), rtol=1e-5, atol=2e-5)


class Attention(nn.Module):
    def __init__(self, enabled):
        super().__init__()
        self.qkv = loralib.MergedLinear(12, 36, r=2, lora_alpha=6, enable_lora=enabled)
        self.out = loralib.Linear(36, 12, r=2, lora_alpha=6)


@pytest.mark.parametrize("sizes", ["12,12,12", "12,-12,12", "-12,12,-12"])
def test_loralibs_file_goes_to_peft_and_back_byte_for_byte(tmp_path, sizes):
    parts = MergedParts.from_text(sizes)
    model = stirred(Attention(list(parts.enable_lora)))
    torch.save(loralib.lora_state_dict(model), tmp_path / "theirs.pt")
    told = Told(alpha=6.0, merged={"qkv": parts})
    write_adapter(read_adapter(tmp_path / "theirs.pt", told), tmp_path / "peft", "peft")
    middle = read_adapter(tmp_path / "peft")
    said = write_adapter(middle, tmp_path / "back.pt", "loralib", told)
    assert said == "lora_alpha=6"
    first, again = (read_torch_archive(tmp_path / name) for name in ("theirs.pt", "back.pt"))
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    merged = model.qkv.weight.detach().clone()
    model.eval()
    torch.testing.assert_close(
        merged + middle.updates["qkv"].delta_OI(), model.qkv.weight, rtol=1e-6, atol=1e-6
    )
    fresh = Attention(list(parts.enable_lora))
    loaded = fresh.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True), strict=False)
    assert not loaded.unexpected_keys


@pytest.mark.parametrize("sizes", ["24,8,8", "24,-8,8", "-24,8,8"])
def test_unequal_parts_go_to_peft_and_back_byte_for_byte(tmp_path, sizes):
    parts = MergedParts.from_text(sizes)
    layer = ours.MergedLinear(
        12, 40, r=2, lora_alpha=6, enable_lora=parts.enable_lora, out_splits=parts.out_splits
    )
    model = stirred(nn.ModuleDict({"qkv": layer}))
    told = Told(alpha=6.0, merged={"qkv": parts})
    write_torch_archive(tmp_path / "a.pt", ours.lora_state_dict(model))
    write_adapter(read_adapter(tmp_path / "a.pt", told), tmp_path / "peft", "peft")
    middle = read_adapter(tmp_path / "peft")
    torch.testing.assert_close(middle.updates["qkv"].delta_OI(), layer.delta(), rtol=1e-6, atol=1e-6)
    assert write_adapter(middle, tmp_path / "back.pt", "loralib", told) == "lora_alpha=6"
    first, again = (read_torch_archive(tmp_path / name) for name in ("a.pt", "back.pt"))
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in first.items())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_the_type_of_the_numbers_is_kept(tmp_path, form, kind):
    weights = made_up("phi3")
    updates = {n: replace(u, a_RI=u.a_RI.to(kind), b_OR=u.b_OR.to(kind)) for n, u in weights.updates.items()}
    write_adapter(replace(weights, updates=updates), tmp_path / NAMES[form], form)
    back = read_adapter(tmp_path / NAMES[form], TOLD)
    assert same_tensors(replace(weights, updates=updates), back)


def test_an_mlx_folder_means_what_mlx_computes_with_it(tmp_path):
    """MLX-LM: y = x Wᵀ + scale · (x lora_a) lora_b, with lora_a (in, rank) and lora_b (rank, out)."""
    weights = made_up("phi3", rank=4, alpha=6.0, rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 5.0})
    write_adapter(weights, tmp_path / "mlx", "mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    parameters = config["lora_parameters"]
    assert config["fine_tune_type"] == "lora"
    assert parameters["rank"] == 4
    model = tiny_model("phi3")
    with torch.no_grad():
        for path in {key.rpartition(".")[0] for key in tensors}:
            assert path.split("layers.")[1].split(".", 1)[1] in parameters["keys"]
            a_IR, b_RO = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
            assert a_IR.shape[1] == b_RO.shape[0] == parameters["rank"]
            model.get_submodule(path).weight += parameters["scale"] * (a_IR @ b_RO).T
    torch.testing.assert_close(logits(model), logits_with(weights), rtol=1e-5, atol=2e-5)


def test_loralibs_file_as_safetensors_is_read_too(tmp_path):
    save_file({"fc.lora_A": torch.ones(2, 3), "fc.lora_B": torch.ones(4, 2)}, tmp_path / "x.safetensors")
    assert read_adapter(tmp_path / "x.safetensors", Told(alpha=4.0)).updates["fc"].scaling == 2.0


def test_loralibs_names_are_written_without_a_pickle_where_the_name_says_so(tmp_path):
    weights = made_up("phi3")
    assert write_adapter(weights, tmp_path / "x.safetensors", "loralib") == "lora_alpha=8"
    assert form_of(tmp_path / "x.safetensors") == "loralib"
    assert same_tensors(read_adapter(tmp_path / "x.safetensors", TOLD), weights)
    write_adapter(weights, tmp_path / "x.pt", "loralib")
    assert load_file(tmp_path / "x.safetensors").keys() == read_torch_archive(tmp_path / "x.pt").keys()


def test_a_single_file_is_named_so_that_it_is_known_again(tmp_path):
    with pytest.raises(UserError, match="not be known by this name") as caught:
        write_adapter(made_up("phi3"), tmp_path / "adapter", "single")
    assert caught.value.do.endswith("adapter.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_loralib_does_not_say_must_be_told(tmp_path):
    model = stirred(Attention([True, False, True]))
    torch.save(loralib.lora_state_dict(model), tmp_path / "x.pt")
    with pytest.raises(AdapterError, match="alpha is not known"):
        read_adapter(tmp_path / "x.pt")
    with pytest.raises(AdapterError, match="looks like a MergedLinear with 2 enabled parts"):
        read_adapter(tmp_path / "x.pt", Told(alpha=6.0))
    with pytest.raises(AdapterError, match="parts that were told"):
        read_adapter(tmp_path / "x.pt", Told(alpha=6.0, merged={"qkv": MergedParts.from_text("12,12,12")}))
    torch.save(loralib.lora_state_dict(model, bias="all"), tmp_path / "b.pt")
    with pytest.raises(AdapterError, match="no part of an update"):
        read_adapter(tmp_path / "b.pt", Told(alpha=6.0))


@pytest.mark.parametrize("rank", [4, 6])
def test_parts_that_share_one_a_are_written_with_it_once_for_each(tmp_path, rank):
    weights = made_up("phi3", rank=rank, alpha=8.0, targets=("qkv_proj",))
    told = Told(merged={"qkv_proj": MergedParts.from_text("32,32,32")})
    assert write_adapter(weights, tmp_path / "x.pt", "loralib", told) == "lora_alpha=8"
    tensors = read_torch_archive(tmp_path / "x.pt")
    for name, update in weights.updates.items():
        layer = loralib.MergedLinear(32, 96, r=rank, lora_alpha=8, enable_lora=[True] * 3, bias=False)
        layer.load_state_dict(
            {part: tensors[f"{name}.{part}"] for part in ("lora_A", "lora_B")}, strict=False
        )
        layer.weight.data.zero_()
        layer.eval()
        torch.testing.assert_close(layer.weight.data, update.delta_OI(), rtol=1e-6, atol=1e-7)


def test_parts_that_do_not_belong_to_the_layer_are_refused(tmp_path):
    weights = made_up("phi3", targets=("qkv_proj",))
    for sizes, match in (("32,32,16", "cannot have the parts"), ("32,-32,32", "told to have none")):
        told = Told(merged={"qkv_proj": MergedParts.from_text(sizes)})
        with pytest.raises(AdapterError, match=match):
            write_adapter(weights, tmp_path / "x.pt", "loralib", told)
        assert not (tmp_path / "x.pt").exists()


def mlx_config(path, **changes):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def mlx_without(part):
    def damage(path):
        tensors = load_file(path / "adapters.safetensors")
        tensors.pop(next(key for key in tensors if key.endswith(part)))
        save_file(tensors, path / "adapters.safetensors")

    return damage


def nan_in(path):
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path, metadata={"lora_r": "4", "lora_alpha": "8"})


FAULTS = {
    "mlx DoRA": ("mlx", lambda p: mlx_config(p, fine_tune_type="dora"), "of type 'dora'"),
    "mlx no scale": ("mlx", lambda p: mlx_config(p, lora_parameters={}), "lacks a usable value"),
    "mlx parameters a list": ("mlx", lambda p: mlx_config(p, lora_parameters=[]), "lacks a usable value"),
    "mlx half a layer": ("mlx", mlx_without("lora_a"), "has only lora_b"),
    "mlx cut": ("mlx", lambda p: os.truncate(p / "adapters.safetensors", 900), "cannot be read"),
    "single cut": ("single", lambda p: os.truncate(p, 3000), "cannot be read"),
    "single empty": ("single", lambda p: os.truncate(p, 0), "cannot be read"),
    "single NaN": ("single", nan_in, "NaN or infinite"),
    "pt a pickle": ("loralib", lambda p: p.write_bytes(b"\x80\x02cposix\nsystem\n."), "safely"),
    "pt a text": ("loralib", lambda p: p.write_text("hello"), "cannot be read safely"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused(tmp_path, fault):
    form, damage, match = FAULTS[fault]
    path = tmp_path / NAMES[form]
    write_adapter(made_up(), path, form)
    damage(path)
    with pytest.raises(AdapterError, match=match) as caught:
        read_adapter(path, TOLD)
    assert str(path) in caught.value.where
    assert caught.value.do


@pytest.mark.parametrize("name", ["missing", "x.txt", "missing.pt"])
def test_what_is_no_adapter_is_refused(tmp_path, name):
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(AdapterError, match="no adapter"):
        read_adapter(tmp_path / name)


def test_an_embedding_or_convolution_in_a_state_dict_is_refused():
    for shape in ((2, 3, 1), (2,)):
        with pytest.raises(AdapterError, match="do not fit each other"):
            from_loralib({"c.lora_A": torch.ones(shape), "c.lora_B": torch.ones(4, 2)}, alpha=1, where="x")


def test_a_file_of_an_older_version_without_the_config_inside_is_read(tmp_path):
    weights = made_up()
    write_adapter(weights, tmp_path / "a", "peft")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file(
        tensors,
        tmp_path / "bare.safetensors",
        metadata={"lora_r": "4", "lora_alpha": "8.0", "base_name": "b"},
    )
    assert same_tensors(read_adapter(tmp_path / "bare.safetensors"), weights)


def test_settings_described_from_updates_give_the_same_updates():
    weights = made_up(
        "phi3", rank_pattern={"o_proj": 3, "layers.0.mlp.down_proj": 5}, alpha_pattern={"o_proj": 7}
    )
    settings = described(weights.updates)
    for name, update in weights.updates.items():
        assert settings.rank_of(name) == update.rank
        assert settings.scaling_of(name) == update.scaling
    plain = made_up("phi3", rank=3, alpha=10.0)
    assert described(plain.updates) == replace(plain.settings, target_modules=None)


def test_no_warning_is_hidden_by_reading_a_transposed_adapter(tmp_path):
    weights = made_up("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_adapter(weights, tmp_path / "a", "peft")
        back = read_adapter(tmp_path / "a")
    assert back.is_transposed
    assert torch.equal(logits_with(back, "gpt2"), logits_with(weights, "gpt2"))
