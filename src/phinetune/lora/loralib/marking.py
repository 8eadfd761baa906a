"""loralib's two functions: what is trained, and what is saved of it. Knows nothing of the arithmetic."""

from __future__ import annotations

from torch import Tensor, nn

from phinetune.base.errors import SettingsError, nearest
from phinetune.lora.loralib.merging import LoRALayer

BIASES = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all but A and B, and by `bias`: no bias, `all` of them, or those of `lora_only` layers."""
    _check_bias(bias)
    biases = _lora_biases(model)
    for name, parameter in model.named_parameters():
        is_wanted_bias = (bias == "all" and "bias" in name) or (bias == "lora_only" and name in biases)
        if "lora_" not in name:
            parameter.requires_grad = is_wanted_bias


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """What `mark_only_lora_as_trainable` with the same `bias` left trainable, by name."""
    _check_bias(bias)
    biases = _lora_biases(model) if bias == "lora_only" else set()
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if "lora_" in name or name in biases or (bias == "all" and "bias" in name)
    }


def _lora_biases(model: nn.Module) -> set[str]:
    """Names of the biases of loralib's layers, those of rank 0 among them: what is trained is saved."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer)]
    return {
        f"{name}.{bias}".removeprefix(".")
        for name, layer in layers
        for bias, _ in layer.named_parameters()
        if bias in ("bias", "conv.bias")
    }


def _check_bias(bias: str) -> None:
    if bias not in BIASES:
        near = nearest(bias, BIASES)
        raise SettingsError(
            f"bias cannot be '{bias}'",
            where="bias",
            do=f"write '{near}'" if near else f"one of {', '.join(BIASES)}",
        )
