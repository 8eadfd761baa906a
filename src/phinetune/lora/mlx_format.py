"""MLX-LM's adapter folders, `adapters.safetensors` and `adapter_config.json`, to and from `AdapterWeights`.

lora_a is (in, rank), lora_b (rank, out), and `scale` is the factor itself, one for all layers, with one
rank. Knows nothing of models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from phinetune.base.errors import AdapterError
from phinetune.lora.tensor_file import read_tensors, write_tensors
from phinetune.lora.weights import AdapterWeights, Update, checked, described

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")


def read_mlx(folder: Path, config: Mapping[str, Any]) -> AdapterWeights:
    """The adapter of an MLX folder whose config has been read. Raises `AdapterError`."""
    where = str(folder)
    if config.get("fine_tune_type") != "lora":
        raise AdapterError(
            f"the adapter is of type {config.get('fine_tune_type')!r}",
            where=where,
            do="use an adapter trained with fine_tune_type lora",
        )
    try:
        parameters = config["lora_parameters"]
        scale, dropout = float(parameters["scale"]), float(parameters.get("dropout") or 0.0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(
            "the adapter's config lacks a usable value",
            where=f"{where}/{CONFIG_FILE}",
            why=f"lora_parameters.scale: {type(error).__name__}",
            do="copy the whole adapter folder again",
        ) from None
    tensors, metadata = read_tensors(folder / WEIGHTS_FILE)
    updates = {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        if part not in ("lora_a", "lora_b"):
            raise AdapterError(
                f"the adapter holds a tensor of unknown meaning, '{key}'",
                where=where,
                do="use a plain LoRA adapter of MLX",
            )
        pair = [tensors.get(f"{name}.{p}") for p in ("lora_a", "lora_b")]
        if pair[0] is None or pair[1] is None:
            raise AdapterError(f"'{name}' has only {part}", where=where, do="copy the file again")
        updates[name] = (
            Update(a_RI=pair[0].mT.contiguous(), b_OR=pair[1].mT.contiguous(), scaling=scale)
            if pair[0].dim() == pair[1].dim() == 2
            else Update(a_RI=pair[0], b_OR=pair[1], scaling=scale)
        )
    if not updates:
        raise AdapterError("the adapter holds no weights", where=where, do="train it again")
    base = str(config.get("model") or "")
    settings = described(updates, dropout=dropout)
    return checked(
        AdapterWeights(updates=updates, settings=settings, base_name=base, metadata=metadata), where
    )


def write_mlx(weights: AdapterWeights, folder: Path, *, where: str) -> None:
    """Write an MLX folder. Smaller ranks are filled up with zeros, scales that differ go into B."""
    if weights.uses_dora:
        raise AdapterError(
            "this DoRA adapter cannot be written for MLX", where=where, do="merge it into its base"
        )
    keys = []
    for name in weights.updates:
        match = _LAYER.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"MLX adapts only layers of the blocks, and '{name}' is none",
                where=where,
                do="train without this target",
            )
        keys.append(match[2])
    uniform = weights.folded()
    rank = max(update.rank for update in uniform.updates.values())
    scale = uniform.settings.alpha / rank
    tensors = {}
    for name, update in uniform.updates.items():
        filled = _filled(update, rank, scale)
        tensors[f"{name}.lora_a"] = filled.a_RI.mT.contiguous()
        tensors[f"{name}.lora_b"] = filled.b_OR.mT.contiguous()
    parameters = {
        "rank": rank,
        "scale": scale,
        "dropout": weights.settings.dropout,
        "keys": sorted(set(keys)),
    }
    config = {
        "model": weights.base_name,
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": parameters,
    }
    write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "mlx", **weights.metadata})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _filled(update: Update, rank: int, scale: float) -> Update:
    """The same update with this rank and scale."""
    factor, missing = update.scaling / scale, rank - update.rank
    b_OR = update.b_OR if factor == 1 else update.b_OR.float() * factor
    if not missing:
        return replace(update, b_OR=b_OR, scaling=scale)
    a_RI = torch.cat([update.a_RI, update.a_RI.new_zeros(missing, update.in_features)])
    b_OR = torch.cat([b_OR, b_OR.new_zeros(update.out_features, missing)], dim=1)
    return Update(a_RI=a_RI, b_OR=b_OR, scaling=scale)
