"""PEFT is the judge: same logits, same gradients, and files that go both ways without a changed byte."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import VOCAB, tiny_model

from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.files import load_adapter, read_metadata, save_adapter

# PEFT asks transformers for a property that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj"],  # these have biases
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
IDS = (torch.arange(60).view(3, 20) * 7) % VOCAB


def peft_model(name, *, rank=4, alpha=6):
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=TARGETS[name], lora_dropout=0.0, task_type="CAUSAL_LM",
        fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    model = get_peft_model(tiny_model(name, implementation="eager"), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max() + 1e-7


@pytest.mark.parametrize("name", TARGETS)
def test_logits_and_gradients_equal_pefts(name):
    theirs = peft_model(name)
    model = tiny_model(name, implementation="eager")
    adapter = attach(model, LoraSettings(rank=4, alpha=6, target_modules=tuple(TARGETS[name])), seed=0)
    peft_parameters = {
        key.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for key, parameter in theirs.named_parameters()
        if "lora_" in key
    }
    assert {key for key, _ in adapter.named_parameters()} == peft_parameters.keys()
    adapter.restore({key: parameter.detach() for key, parameter in peft_parameters.items()})

    direction = torch.randn(*IDS.shape, VOCAB, generator=torch.Generator().manual_seed(4))
    (logits(model) * direction).mean().backward()
    (logits(theirs) * direction).mean().backward()
    assert_close(logits(model), logits(theirs))
    for key, parameter in adapter.named_parameters():
        expected = peft_parameters[key].grad
        assert expected.abs().max() > 0
        assert (parameter.grad - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-8, key


@pytest.mark.parametrize("name", TARGETS)
def test_peft_loads_our_directory(name, tmp_path):
    model = tiny_model(name, implementation="eager")
    adapter = attach(model, LoraSettings(rank=3, alpha=7.5, target_modules=tuple(TARGETS[name])), seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(adapter, tmp_path, base_name="base", metadata={"base_sha256": "x", "seed": "42"})
    plain = logits(tiny_model(name, implementation="eager"))
    theirs = PeftModel.from_pretrained(tiny_model(name, implementation="eager"), tmp_path).eval()
    assert_close(logits(model), logits(theirs))
    assert (logits(model) - plain).abs().max() > 1e-2
    header = read_metadata(tmp_path)
    assert (header["base_sha256"], header["seed"], header["lora_r"]) == ("x", "42", "3")


@pytest.mark.parametrize("name", TARGETS)
def test_we_load_pefts_directory(name, tmp_path):
    theirs = peft_model(name)
    theirs.save_pretrained(tmp_path)
    model = tiny_model(name, implementation="eager")
    adapter = load_adapter(model, tmp_path, base_sha256="a base that PEFT knows nothing of")
    assert_close(logits(model), logits(theirs))
    assert adapter.settings.rank == 4
    assert adapter.settings.scaling == 1.5
    assert sorted(adapter.settings.target_modules) == sorted(TARGETS[name])


@pytest.mark.parametrize("name", TARGETS)
def test_tensors_come_back_from_peft_without_a_changed_byte(name, tmp_path):
    ours, through, back = (tmp_path / part for part in ("ours", "peft", "back"))
    ours.mkdir()
    back.mkdir()
    model = tiny_model(name, implementation="eager")
    adapter = attach(model, LoraSettings(rank=4, alpha=8, target_modules=tuple(TARGETS[name])), seed=0)
    save_adapter(adapter, ours, base_name="base", metadata={})
    PeftModel.from_pretrained(tiny_model(name, implementation="eager"), ours).save_pretrained(
        through, save_embedding_layers=False
    )
    again = load_adapter(tiny_model(name, implementation="eager"), through)
    save_adapter(again, back, base_name="base", metadata={})
    files = [load_file(folder / "adapter_model.safetensors") for folder in (ours, through, back)]
    assert files[0].keys() == files[1].keys() == files[2].keys()
    for key, tensor in files[0].items():
        assert tensor.dtype == files[1][key].dtype == torch.float32
        assert torch.equal(tensor, files[1][key])
        assert torch.equal(tensor, files[2][key])
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, back)]
    assert configs[0] == configs[1]


def test_weights_made_in_bfloat16_are_read(tmp_path):
    peft_model("phi3").to(torch.bfloat16).save_pretrained(tmp_path)
    adapter = load_adapter(tiny_model("phi3"), tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name, weight = next(iter(adapter.named_parameters()))
    assert torch.equal(weight, stored[f"base_model.model.{name}.weight"].float())


# The fields of LoraConfig in the versions named, read from their packages. PEFT until 0.5 ignores a key it
# does not know, so that what it means is lost; later versions fail over it.
PEFT_0_3 = {
    "base_model_name_or_path", "peft_type", "task_type", "inference_mode", "r", "target_modules",
    "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save", "init_lora_weights",
}  # fmt: skip
PEFT_0_5 = PEFT_0_3 | {"auto_mapping", "revision", "layers_to_transform", "layers_pattern"}
PEFT_0_7 = PEFT_0_5 | {"rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config"}
PEFT_0_9 = PEFT_0_7 | {"use_rslora", "use_dora"}


@pytest.mark.parametrize(
    ("options", "readers"),
    [
        ({}, PEFT_0_3),
        ({"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 3.0}}, PEFT_0_7),
        ({"use_rslora": True}, PEFT_0_9),
    ],
)
def test_the_config_holds_no_key_that_old_readers_do_not_know_and_need_not(tmp_path, options, readers):
    save_adapter(
        attach(tiny_model("phi3"), LoraSettings(**options), seed=0), tmp_path, base_name="b", metadata={}
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.keys() <= readers
    assert config.keys() == PEFT_0_3 | options.keys()
    assert isinstance(config["r"], int)
    assert isinstance(config["lora_alpha"], int), "as PEFT declares it, where it is a whole number"
    assert isinstance(config["target_modules"], list)
    assert (
        PeftConfig.from_pretrained(tmp_path).to_dict().items()
        >= {key: value for key, value in config.items() if key != "target_modules"}.items()
    )
