"""Choose the layers of a model to adapt: by name, by pattern, by the number of their block.

A name that matches nothing is an error: a half-attached adapter trains and answers, only badly.
Knows nothing of LoRA layers or files.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from phinetune.base.errors import SettingsError, nearest
from phinetune.lora.frozen import is_linear
from phinetune.lora.settings import LoraSettings, fits

# Every linear layer of the decoder blocks, by transformers' `model_type`.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
for _model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"):
    DEFAULT_TARGETS[_model_type] = _SPLIT

# As PEFT finds the number of a layer's block: the first part of the path that is a number below a name.
_BLOCK = re.compile(r".*?\.(?P<list>[^.]*)\.(?P<number>\d+)\.")


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


def choose(
    model: nn.Module, linears: Mapping[str, nn.Module], settings: LoraSettings
) -> dict[str, nn.Module]:
    """The layers that the settings mean, by path. Raises `SettingsError` for a name that means none."""
    experts = _expert_weights(model)
    if experts and not settings.target_modules:
        raise _needs_a_choice(experts, linears)
    targets = settings.target_modules or default_targets(model)
    if settings.layers_to_transform is not None:
        _check_numbers(linears, settings)
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        matched = [name for name in linears if _matches(name, target)]
        if not matched and any(_matches(name, target) for name in experts):
            raise _is_of_experts(target, experts, linears)
        if not matched:
            raise _no_match(target, linears, settings.target_modules is not None)
        chosen.update(
            (name, linears[name]) for name in matched if name == target or _in_blocks(name, settings)
        )
    if not chosen:
        raise SettingsError(
            "no targeted layer is in the blocks of layers_to_transform",
            where="layers_to_transform",
            why=f"the targets {', '.join(targets)} are in other blocks",
            do="choose other blocks, or other lora_target_modules",
        )
    for where, pattern in (
        ("rank_pattern", settings.rank_pattern),
        ("alpha_pattern", settings.alpha_pattern),
    ):
        for key in pattern:
            if not any(fits(name, key) for name in chosen):
                raise _idle_key(where, key, chosen)
    return chosen


def block_of(name: str, layers_pattern: Iterable[str] = ()) -> int | None:
    """The number of the block a layer is in, counted in the list of one of these names, or in any.

    >>> block_of("model.layers.3.mlp.down_proj"), block_of("model.layers.3.mlp.down_proj", ["h"])
    (3, None)
    """
    patterns = list(layers_pattern)
    if not patterns:
        found = _BLOCK.match(name)
        return int(found["number"]) if found else None
    parts = name.split(".")
    for pattern in patterns:
        for place, part in enumerate(parts[:-2]):
            if part == pattern and parts[place + 1].isdecimal():
                return int(parts[place + 1])
    return None


def _in_blocks(name: str, settings: LoraSettings) -> bool:
    if settings.layers_to_transform is None:
        return True
    return block_of(name, settings.layers_pattern) in settings.layers_to_transform


def _check_numbers(linears: Mapping[str, nn.Module], settings: LoraSettings) -> None:
    numbers = {block_of(name, settings.layers_pattern) for name in linears} - {None}
    missing = sorted(set(settings.layers_to_transform or ()) - numbers)
    if missing:
        highest = max((number for number in numbers if number is not None), default=None)
        in_list = f" in {', '.join(settings.layers_pattern)}" if settings.layers_pattern else ""
        raise SettingsError(
            f"layers_to_transform names block {missing[0]}, which the model does not have",
            where="layers_to_transform",
            why=f"its blocks{in_list} are 0 to {highest}" if highest is not None else f"no block{in_list}",
            do="choose from these numbers" if highest is not None else "leave layers_pattern out",
        )


def _expert_weights(model: nn.Module) -> list[str]:
    """The names of weights of all experts of a layer in one tensor, and of the modules that hold them."""
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        for attribute, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3 and not hasattr(module, "kernel_size"):  # a convolution's is no expert's
                found[name], found[f"{name}.{attribute}"] = None, None
    return list(found)


def _attention_only(linears: Mapping[str, nn.Module]) -> str:
    names = dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears)
    return f"write lora_target_modules: [{', '.join(names)}], the linear layers around the experts"


def _needs_a_choice(experts: Sequence[str], linears: Mapping[str, nn.Module]) -> SettingsError:
    return SettingsError(
        "a mixture of experts has no default targets",
        where="lora_target_modules",
        why=f"its experts ({experts[0]}) hold all their weights in one tensor, which gets no updates here; "
        "to adapt the rest alone is a choice of yours",
        do=_attention_only(linears),
    )


def _is_of_experts(target: str, experts: Sequence[str], linears: Mapping[str, nn.Module]) -> SettingsError:
    return SettingsError(
        f"target module '{target}' is of experts, which cannot be adapted",
        where="lora_target_modules",
        why=f"{experts[0]} holds the weights of all experts in one tensor, not in linear layers",
        do=_attention_only(linears),
    )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatch.fnmatchcase(name, target)


def _no_match(target: str, linears: Mapping[str, nn.Module], was_asked: bool) -> SettingsError:
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


def _idle_key(where: str, key: str, chosen: Mapping[str, nn.Module]) -> SettingsError:
    known = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    near = nearest(key, [*known, *chosen])
    return SettingsError(
        f"'{key}' in {where} fits no adapted layer",
        where=where,
        why=f"a key is the end of a layer's path at a dot; the adapted layers are named {', '.join(known)}",
        do=f"write '{near}'" if near else "choose from these names",
    )
