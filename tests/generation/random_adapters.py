"""Adapters with random weights for the tiny decoders, large enough to change every answer."""

from __future__ import annotations

from typing import Any

import torch

from phinetune.lora.attach import LoraSettings, linear_layers
from phinetune.lora.weights import AdapterWeights, Update


def random_adapter(model: Any, *, rank: int, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, layer in linear_layers(model).items():
        shape = tuple(layer.weight.shape)
        out_features, in_features = shape if isinstance(layer, torch.nn.Linear) else shape[::-1]
        updates[name] = Update(
            a_RI=torch.randn(rank, in_features, generator=generator) * 0.3,
            b_OR=torch.randn(out_features, rank, generator=generator) * 0.3,
            scaling=0.5,
        )
    is_transposed = type(model).__name__.startswith("GPT2")
    return AdapterWeights(
        updates=updates, settings=LoraSettings(rank=rank, alpha=0.5 * rank), is_transposed=is_transposed
    )
