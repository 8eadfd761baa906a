"""How near a model comes to its base again when an adapter is taken out of it.

Every weight was rounded twice on that way: measured where the base is at hand, else bounded.
Knows nothing of how adapters are merged.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from phinetune.lora.weights import AdapterWeights
from phinetune.models.catalog import find_model, is_on_this_machine, weight_files, weights_sha256


def original_of(weights: AdapterWeights) -> Path | None:
    """The folder of the very base the adapter was trained on, if it is on this machine."""
    name = weights.base_name
    if not name or not weights.base_sha256 or not is_on_this_machine(name):
        return None
    folder = find_model(name)
    return folder if weights_sha256(folder) == weights.base_sha256 else None


def measured_difference(folder: Path, original: Path) -> float:
    """The greatest difference of a weight between two models with the same tensors; 0 is bit for bit."""
    places: dict[str, Path] = {}
    for shard in weight_files(original):
        with safe_open(shard, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), shard)
    greatest = 0.0
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                with safe_open(places[key], framework="pt") as other:
                    difference = file.get_tensor(key).float() - other.get_tensor(key).float()
                greatest = max(greatest, float(difference.abs().max()) if difference.numel() else 0.0)
    return greatest


def greatest_difference(merged: Tensor, written: Tensor) -> float:
    """The most that one weight can be away from the base's: half a step at each of the two roundings.

    `merged` is the weight with the update in it, `written` the one without, both in the base's type.
    """
    change = (written.float() - merged.float()).abs()
    arithmetic = 4 * torch.finfo(torch.float32).eps * change  # the update itself is formed twice
    return float(((_step(merged) + _step(written)) / 2 + arithmetic).max())


def _step(weight: Tensor) -> Tensor:
    """The distance to the next number of the same type."""
    exponent = torch.frexp(weight.float()).exponent - 1
    step = torch.finfo(weight.dtype).eps * torch.exp2(exponent.float())
    return torch.where(weight == 0, 0.0, step)
