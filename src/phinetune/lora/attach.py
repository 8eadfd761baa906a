"""Choose the layers of a model to adapt, put LoRA layers in their place, and say what was covered.

A name that matches nothing is an error: a half-attached adapter trains and answers, only badly.
Knows nothing of files or training.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from phinetune.base.errors import SettingsError, nearest
from phinetune.base.seeds import derive
from phinetune.lora.frozen import is_linear
from phinetune.lora.layers import LoraLinear
from phinetune.lora.settings import LoraSettings

__all__ = [
    "DEFAULT_TARGETS",
    "Adapter",
    "Coverage",
    "LoraSettings",
    "attach",
    "default_targets",
    "linear_layers",
    "require_bare",
]

# Every linear layer of the decoder blocks, by transformers' `model_type`.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
for _model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "smollm3"):
    DEFAULT_TARGETS[_model_type] = _SPLIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """One row of the coverage table: a target name, how many layers it matched, what it trains."""

    target: str
    num_layers: int
    in_features: int
    out_features: int
    num_parameters: int


class Adapter:
    """The LoRA layers attached to one model, by the module path they took the place of."""

    def __init__(self, layers: dict[str, LoraLinear], settings: LoraSettings) -> None:
        self.layers = layers
        self.settings = settings

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """A and B of every layer as `<module>.lora_A`, `<module>.lora_B`, in the order of the model."""
        for name, layer in self.layers.items():
            yield f"{name}.lora_A", layer.lora_A
            yield f"{name}.lora_B", layer.lora_B

    def parameters(self) -> list[nn.Parameter]:
        """The trained weights, in the order of the model."""
        return [parameter for _, parameter in self.named_parameters()]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last parts of the adapted modules' names, sorted."""
        return tuple(sorted({name.rsplit(".", 1)[-1] for name in self.layers}))

    @property
    def coverage(self) -> list[Coverage]:
        rows = []
        for target in dict.fromkeys(name.rsplit(".", 1)[-1] for name in self.layers):
            layers = [layer for name, layer in self.layers.items() if name.rsplit(".", 1)[-1] == target]
            rows.append(
                Coverage(
                    target=target,
                    num_layers=len(layers),
                    in_features=layers[0].in_features,
                    out_features=layers[0].out_features,
                    num_parameters=sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers),
                )
            )
        return rows

    def reset(self, seed: int) -> None:
        """Fresh weights: a pure function of the seed and each layer's name."""
        for name, layer in self.layers.items():
            layer.reset(torch.Generator().manual_seed(derive(seed, "lora", name)))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model answers as the base alone."""
        before = [layer.is_enabled for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.is_enabled = False
        try:
            yield
        finally:
            for layer, was_enabled in zip(self.layers.values(), before, strict=True):
                layer.is_enabled = was_enabled

    def whole(self) -> dict[str, torch.Tensor]:
        """A copy of the weights that are trained whole, not by an update; an adapter alone has none."""
        return {}

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of the weights on the CPU, by the names of `named_parameters`."""
        return {name: weight.detach().to("cpu", copy=True) for name, weight in self.named_parameters()}

    def restore(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the weights to those of a `snapshot`."""
        with torch.no_grad():
            for name, weight in self.named_parameters():
                weight.copy_(weights[name])

    def detach(self, model: nn.Module) -> None:
        """Put the frozen layers back in their places."""
        for name, layer in self.layers.items():
            _set_module(model, name, layer.base)


def attach(model: nn.Module, settings: LoraSettings, *, seed: int) -> Adapter:
    """Freeze `model` and put a `LoraLinear` in the place of every targeted linear layer.

    Targets are last parts of module names (`qkv_proj`), module paths, or either with `*`.
    Raises `SettingsError` when a target matches no linear layer, or the model has an adapter already.
    """
    require_bare(model)
    linears = linear_layers(model)
    targets = settings.target_modules or default_targets(model)
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        matched = [name for name in linears if _matches(name, target)]
        if not matched:
            raise _no_match(target, linears, settings.target_modules is not None)
        chosen.update((name, linears[name]) for name in matched)
    model.requires_grad_(False)
    layers: dict[str, LoraLinear] = {}
    for name in linears:  # the order of the model, whatever the order of the targets
        if name in chosen:
            layers[name] = LoraLinear(
                chosen[name],
                rank=settings.rank_of(name),
                scaling=settings.scaling_of(name),
                dropout=settings.dropout,
            )
            layers[name].train(chosen[name].training)  # a base that answers gets no dropout
            _set_module(model, name, layers[name])
    adapter = Adapter(layers, settings)
    adapter.reset(seed)
    return adapter


def require_bare(model: nn.Module) -> None:
    """Raise `SettingsError` when the model has an adapter already: two would be one on top of the other."""
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise SettingsError(
            "the model already has an adapter",
            why="a second one would be attached to the layers of the first",
            do="detach the first adapter, or load the base again",
        )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that can be adapted, by path; the output head is not one of them."""
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    return {
        name: module for name, module in model.named_modules() if is_linear(module) and module is not head
    }


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """All linear layers of the blocks: by architecture, or found by looking when it is not known."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    if model_type in DEFAULT_TARGETS:
        return DEFAULT_TARGETS[model_type]
    return tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear_layers(model)))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatch.fnmatchcase(name, target)


def _no_match(target: str, linears: dict[str, nn.Module], was_asked: bool) -> SettingsError:
    known = sorted({name.rsplit(".", 1)[-1] for name in linears})
    near = nearest(target, known)
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    if fused.get(target) in known:
        near = fused[target]
    return SettingsError(
        f"target module '{target}' matches no linear layer of the model",
        where="lora_target_modules" if was_asked else "the default targets of this architecture",
        why=f"the model's linear layers are named {', '.join(known)}",
        do=f"write '{near}'" if near else "choose from these names",
    )


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child, module)
