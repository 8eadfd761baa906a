"""Every architecture named: default targets, a loss that packing does not change, files that PEFT loads."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft_twins import assert_close, logits
from tiny_models import ARCHITECTURES, MIXTURES, as_base, random_rows, tiny_model

from phinetune.base.errors import SettingsError
from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.files import save_adapter
from phinetune.models.batch import PackedBatch
from phinetune.models.loss import trained_token_loss

# PEFT asks transformers for a property that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SPLIT = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
TARGETS = {
    **dict.fromkeys(("phi3", "phi3-window", "phi3.5-longrope", "phi4-mini"), FUSED),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral-window"), SPLIT),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "smollm3"), SPLIT),
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = [*ARCHITECTURES, *MIXTURES]


def test_no_architecture_is_left_out():
    assert set(ARCHITECTURES) == TARGETS.keys()


def adapted(name, **options):
    model = tiny_model(name, **options)
    targets = ATTENTION if name in MIXTURES else None
    adapter = attach(model, LoraSettings(rank=4, target_modules=targets), seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model, adapter


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_default_targets_are_all_linear_layers_of_the_blocks(name):
    adapter = attach(tiny_model(name), LoraSettings(rank=2), seed=0)
    assert set(adapter.target_modules) == TARGETS[name]
    assert all(row.num_layers in (2, 4) for row in adapter.coverage)  # GPT-2 has two c_proj in a block


@pytest.mark.parametrize("name", ALL)
def test_packed_loss_and_gradients_are_those_of_the_rows_one_by_one(name):
    model, adapter = adapted(name)
    base, rows = as_base(model), random_rows([12, 40, 7, 25, 33])
    for weight in adapter.parameters():
        weight.requires_grad_(True)

    def measured(batches):
        for weight in adapter.parameters():
            weight.grad = None
        losses = [trained_token_loss(base, PackedBatch.lay(batch))[0] for batch in batches]
        sum(losses).backward()
        return sum(losses).item(), {key: weight.grad for key, weight in adapter.named_parameters()}

    (packed, gradients), (apart, expected) = measured([rows]), measured([[row] for row in rows])
    assert packed == pytest.approx(apart, rel=1e-5)
    for key, gradient in gradients.items():
        assert expected[key].abs().max() > 0
        assert (gradient - expected[key]).abs().max() <= 1e-4 * expected[key].abs().max() + 1e-6, key


@pytest.mark.parametrize("name", ALL)
def test_peft_loads_what_is_saved_and_answers_the_same(name, tmp_path):
    model, adapter = adapted(name, implementation="eager")
    save_adapter(adapter, tmp_path, base_name="base", metadata={})
    theirs = PeftModel.from_pretrained(tiny_model(name, implementation="eager"), tmp_path).eval()
    assert_close(logits(theirs), logits(model))
    assert (logits(model) - logits(tiny_model(name, implementation="eager"))).abs().max() > 1e-2


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("targets", [None, ("gate_up_proj",), ("q_proj", "experts"), ("*experts*",)])
def test_experts_are_refused_with_the_layers_that_can_be_adapted(name, targets):
    model = tiny_model(name)
    with pytest.raises(SettingsError, match="expert") as caught:
        attach(model, LoraSettings(target_modules=targets), seed=0)
    assert "[q_proj, k_proj, v_proj, o_proj]" in caught.value.do
    assert all(parameter.requires_grad for parameter in model.parameters())
