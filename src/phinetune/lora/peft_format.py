"""PEFT directories: `adapter_config.json` and `adapter_model.safetensors`, to and from `AdapterWeights`.

The config that is written holds no key that it does not need, so that old readers take it. What a file
says and this project cannot honour is an error: ignoring it would give wrong answers. Knows nothing of
models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from phinetune.base.errors import AdapterError
from phinetune.lora.peft_config import read_config, settings_of
from phinetune.lora.settings import LoraSettings
from phinetune.lora.tensor_file import read_tensors, write_tensors
from phinetune.lora.torch_archive import read_torch_archive
from phinetune.lora.weights import AdapterWeights, Update, checked
from phinetune.lora.whole import ROWS

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What PEFT wrote until 0.6: a pickle, which is read without being run.
OLD_WEIGHTS_FILE = "adapter_model.bin"
# The key of the safetensors metadata that holds the config as JSON.
CONFIG_KEY = "adapter_config"
_OWN_KEYS = {"format", "lora_r", "lora_alpha", CONFIG_KEY}
_PREFIX = "base_model.model."
_HEADS = ("score", "classifier")
_ENDINGS = {
    ".lora_A.weight": "a_RI",
    ".lora_B.weight": "b_OR",
    ".lora_magnitude_vector": "magnitude_O",
    ".lora_magnitude_vector.weight": "magnitude_O",
}


def read_peft(folder: Path) -> AdapterWeights:
    """The adapter of a PEFT directory. Raises `AdapterError` naming what is wrong with it."""
    config = read_config(folder / CONFIG_FILE)
    settings = settings_of(config, folder / CONFIG_FILE)
    old = folder / OLD_WEIGHTS_FILE
    if old.is_file() and not (folder / WEIGHTS_FILE).exists():
        return from_peft_tensors(read_torch_archive(old), config, settings, {}, folder)
    tensors, metadata = read_tensors(folder / WEIGHTS_FILE)
    return from_peft_tensors(tensors, config, settings, metadata, folder)


def from_peft_tensors(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    settings: LoraSettings,
    metadata: Mapping[str, str],
    where: Path,
) -> AdapterWeights:
    """The adapter whose tensors have PEFT's names and whose config has PEFT's keys."""
    places = _whole_places(tensors, settings)
    modules = dict.fromkeys(
        name.rpartition(".")[0] for name in places.values() if _is_of_module(name, settings)
    )
    is_classifier = config.get("task_type") == "SEQ_CLS"
    for asked in settings.modules_to_save:
        if is_classifier and asked in _HEADS and any(module in _HEADS for module in modules):
            continue  # PEFT names both for every classifier, which has one of them
        if not any(asked in module for module in modules):
            raise AdapterError(
                f"the adapter holds no weights of '{asked}'",
                where=str(where),
                why="its config names it in modules_to_save",
                do="copy the whole adapter folder again",
            )
    settings = replace(settings, modules_to_save=tuple(modules))
    weights = AdapterWeights(
        updates=_updates({k: v for k, v in tensors.items() if k not in places}, settings, where),
        settings=settings,
        whole={name: tensors[key] for key, name in places.items()},
        base_name=str(config.get("base_model_name_or_path") or ""),
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
        is_transposed=bool(config.get("fan_in_fan_out")),
        metadata={key: text for key, text in metadata.items() if key not in _OWN_KEYS},
    )
    if bool(config.get("use_dora")) != weights.uses_dora and weights.updates:
        first = next(iter(weights.updates))
        raise AdapterError(
            f"'{first}' has no magnitude, though the config says DoRA"
            if config.get("use_dora")
            else "the adapter holds magnitudes, though the config does not say DoRA",
            where=str(where),
            why=f"use_dora is {json.dumps(config.get('use_dora', False))}",
            do="copy the whole adapter folder again",
        )
    return checked(weights, str(where))


def write_peft(weights: AdapterWeights, folder: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write the two files into an existing folder; `metadata` goes into the safetensors header."""
    header = peft_header(weights, weights.metadata if metadata is None else metadata)
    write_tensors(folder / WEIGHTS_FILE, peft_tensors(weights), header)
    text = json.dumps(peft_config(weights), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def peft_header(weights: AdapterWeights, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of the weights file: with the config in it, the file alone is a whole adapter."""
    settings = weights.settings
    header = {"lora_r": str(settings.rank), "lora_alpha": str(settings.alpha)}
    return {"format": "pt", **metadata, **header, CONFIG_KEY: json.dumps(peft_config(weights))}


def peft_tensors(weights: AdapterWeights) -> dict[str, Tensor]:
    """The tensors under PEFT's names."""
    tensors = {}
    for name, update in weights.updates.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = update.a_RI.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = update.b_OR.contiguous()
        if update.magnitude_O is not None:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = update.magnitude_O.contiguous()
    for name, tensor in weights.whole.items():
        module, _, attribute = name.rpartition(".")
        # Where PEFT keeps them: a bias under the adapted layer's base, rows in an adapter of their own.
        below = ".base_layer" if module in weights.updates else ".token_adapter" if attribute == ROWS else ""
        tensors[f"{_PREFIX}{module}{below}.{attribute}"] = tensor.contiguous()
    return tensors


def peft_config(weights: AdapterWeights) -> dict[str, Any]:
    """The content of `adapter_config.json`: what PEFT 0.3 knows, and of later keys those that are used.

    A reader that does not know a key ignores it (PEFT until 0.5) or fails (later), even where it is off.
    """
    settings = weights.settings
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": weights.task_type,
        "base_model_name_or_path": weights.base_name,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": _tidy(settings.alpha),
        "lora_dropout": settings.dropout,
        "target_modules": list(weights.target_modules),
        "modules_to_save": list(settings.modules_to_save) or None,
        "bias": settings.bias,
        "fan_in_fan_out": weights.is_transposed,
        "init_lora_weights": True,
    }
    later: dict[str, Any] = {
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": {key: _tidy(alpha) for key, alpha in settings.alpha_pattern.items()},
        "use_rslora": settings.use_rslora,
        "use_dora": weights.uses_dora,
        "layers_to_transform": list(settings.layers_to_transform or ()),
        "layers_pattern": list(settings.layers_pattern),
        "trainable_token_indices": list(settings.trainable_token_indices),
    }
    return config | {key: value for key, value in later.items() if value}


def _tidy(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _whole_places(tensors: Mapping[str, Tensor], settings: LoraSettings) -> dict[str, str]:
    """The tensors that were trained whole, as the config says: key in the file to name."""
    places = {}
    for key in tensors:
        name = key.removeprefix(_PREFIX)
        if name == key or key.endswith(tuple(_ENDINGS)):
            continue
        if settings.trainable_token_indices and name.endswith(f".token_adapter.{ROWS}"):
            places[key] = name.replace(".token_adapter.", ".")
        elif settings.bias != "none" and "bias" in name.rpartition(".")[2]:
            places[key] = name.replace(".base_layer.", ".")
        elif _is_of_module(name, settings):
            places[key] = name
    return places


def _is_of_module(name: str, settings: LoraSettings) -> bool:
    """Whether a weight belongs to one of modules_to_save; PEFT compares the ends of paths as letters."""
    module = name.rpartition(".")[0]
    return any(module.endswith(asked) or f".{asked}." in f".{module}." for asked in settings.modules_to_save)


def _updates(tensors: Mapping[str, Tensor], settings: LoraSettings, where: Path) -> dict[str, Update]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
        if ending is None or not key.startswith(_PREFIX):
            raise AdapterError(
                f"the adapter holds a tensor of unknown meaning, '{key}'",
                where=str(where),
                do="use a plain LoRA adapter in PEFT's form",
            )
        name = key.removeprefix(_PREFIX).removesuffix(ending)
        parts.setdefault(name, {})[_ENDINGS[ending]] = value
    updates = {}
    for name, found in parts.items():
        for part, tensor_name in (("a_RI", "lora_A"), ("b_OR", "lora_B")):
            if part not in found:
                raise AdapterError(
                    f"'{name}' has no {tensor_name}", where=str(where), do="copy the file again"
                )
        rank = settings.rank_of(name)
        if found["a_RI"].dim() == 2 and found["a_RI"].shape[0] != rank:
            raise AdapterError(
                f"lora_A of '{name}' has the wrong shape",
                where=str(where),
                why=f"it is {tuple(found['a_RI'].shape)}; the config says rank {rank}",
                do="copy the whole adapter folder again",
            )
        updates[name] = Update(scaling=settings.scaling_of(name), **found)
    return updates
