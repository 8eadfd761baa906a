"""Whichever way a token's update is computed, it is that of the token's own adapter."""

from __future__ import annotations

import pytest
import torch

from phinetune.generation import mixed_linear
from phinetune.generation.mixing import MixedLayers
from phinetune.lora.attach import linear_layers

from .random_adapters import random_adapter
from .tiny_decoders import tiny_base

NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    "seats",
    [
        [1] * 3,
        [0] * 3,
        [2, 0, 1, 2],
        [1] + [2] * 40,
        [3, 1, 0] + [2] * 33 + [1] * 40 + [0] * 5,
        [0] * 50 + [3] * 50,
        [3] * 32,
    ],
)
def test_long_runs_and_single_tokens_get_their_own_update(monkeypatch, seats):
    monkeypatch.setattr(mixed_linear, "LONG_RUN", 32)
    monkeypatch.setattr(mixed_linear, "RUN_MULTIPLE", 16)
    base = tiny_base("phi3")
    linear = linear_layers(base.model)[NAME]
    adapters = [random_adapter(base.model, rank=rank, seed=rank) for rank in (2, 4, 8)]
    layers = MixedLayers(base.model)
    for seat, weights in enumerate(adapters, start=1):
        layers.place(seat, weights.updates)
    x_TI = torch.randn(len(seats), linear.in_features, generator=torch.Generator().manual_seed(0))
    expected = [linear.weight @ x_I for x_I in x_TI]
    for token, seat in enumerate(seats):
        if seat:
            update = adapters[seat - 1].updates[NAME]
            expected[token] = expected[token] + update.scaling * update.b_OR @ (update.a_RI @ x_TI[token])
    layers.mix.begin(seats)
    with torch.inference_mode():
        mixed = base.model.get_submodule(NAME)(x_TI[None])[0]
    assert torch.allclose(mixed, torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_small_weights_stand_above_the_adapters_and_are_given_back(monkeypatch, limit):
    monkeypatch.setattr(mixed_linear, "WIDENED_BYTES", limit)
    base = tiny_base("phi3")
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    linear, updates = linear_layers(base.model)[NAME], random_adapter(base.model, rank=2, seed=0).updates
    layers = MixedLayers(base.model)
    for seat in range(1, 10):  # more than fit at first, twice
        layers.place(seat, updates)
    assert (linear.weight.untyped_storage().nbytes() > linear.weight.nbytes) == bool(limit)
    for name, weight in base.model.named_parameters():
        assert torch.equal(weight, before[name.replace(".inner.", ".")])
    layers.remove()
    for name, weight in base.model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.untyped_storage().nbytes() == weight.nbytes
