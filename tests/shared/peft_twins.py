"""The same adapter in PEFT and here, on two copies of one tiny model, and whether both compute the same."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, tiny_model

from phinetune.lora.attach import Adapter, LoraSettings, attach

IDS = (torch.arange(60).view(3, 20) * 7) % VOCAB


def peft_twin(name: str, *, stir: float = 0.2, **config: Any) -> Any:
    """A PEFT model whose trained weights are moved away from where they begin."""
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that is on its way out, and warns of what is meant here.
        warnings.simplefilter("ignore")
        model = get_peft_model(
            tiny_model(name, implementation="eager"),
            LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, fan_in_fan_out=name == "gpt2", **config),
        )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(stir * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def trained_of(peft_model: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's trained weights by our names."""
    return {
        key.removeprefix("base_model.model.")
        .replace(".modules_to_save.default.", ".")
        .replace(".default.weight", "")
        .replace(".default", "")
        .replace(".base_layer.", ".")
        .replace(".token_adapter.", "."): parameter
        for key, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }


def our_twin(name: str, settings: LoraSettings, theirs: Any) -> tuple[Any, Adapter]:
    """Our adapter on the same base with PEFT's weights."""
    model = tiny_model(name, implementation="eager")
    adapter = attach(model, settings, seed=0)
    trained = trained_of(theirs)
    assert {key for key, _ in adapter.named_parameters()} == trained.keys()
    with torch.no_grad():
        for key, weight in adapter.named_parameters():
            weight.copy_(trained[key])
    return model, adapter


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max() + 1e-8


def assert_same_work(model: Any, adapter: Adapter, theirs: Any, *, tolerance: float = 1e-6) -> None:
    """Logits and the gradient of every trained weight, relative to the largest of each."""
    direction = torch.randn(*IDS.shape, VOCAB, generator=torch.Generator().manual_seed(4))
    trained = trained_of(theirs)
    for parameter in (*adapter.parameters(), *trained.values()):
        parameter.grad = None
    ours_logits, theirs_logits = logits(model), logits(theirs)
    assert_close(ours_logits, theirs_logits, tolerance)
    (ours_logits * direction).mean().backward()
    (theirs_logits * direction).mean().backward()
    for key, parameter in adapter.named_parameters():
        expected = trained[key].grad
        assert expected is not None, key
        assert parameter.grad is not None, key
        assert expected.abs().max() > 0, key
        difference = (parameter.grad - expected).abs().max()
        # Two orders of summation through the whole model: a last bit more than for one product.
        assert difference <= 5 * tolerance * expected.abs().max() + 1e-8, (key, float(difference))
