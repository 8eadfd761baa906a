"""The engine answers on a quantised base as that base answers alone, and never forms its whole weights."""

from __future__ import annotations

import torch

from phinetune.generation.engine import Engine
from phinetune.generation.mixing import MixedLayers
from phinetune.generation.request import Request
from phinetune.generation.scheduler import Limits
from phinetune.lora.attach import linear_layers
from phinetune.lora.files import load_weights
from phinetune.models.quantized import QuantizedLinear, quantized

from .random_adapters import random_adapter
from .tiny_decoders import tiny_base


def quantised_base():
    base = tiny_base("phi3")
    for name, layer in linear_layers(base.model).items():
        parent, _, child = name.rpartition(".")
        made = quantized(layer.weight.detach(), layer.bias, "int8", dtype=torch.float32)
        setattr(base.model.get_submodule(parent), child, made)
    return base


def answers(base, adapter, **limits):
    with Engine(base, Limits(**limits)) as engine:
        if adapter is not None:
            engine.load("one", adapter)
        rows = [
            engine.submit(
                Request(prompt=(3, 4, 5 + index), max_new_tokens=6, adapter="one" if adapter else None)
            )
            for index in range(3)
        ]
        while not engine.is_idle:
            engine.step()
        return [row.tokens for row in rows]


def test_rows_with_an_adapter_are_those_of_the_adapter_attached():
    adapter = random_adapter(tiny_base("phi3").model, rank=4, seed=1)
    mixed = answers(quantised_base(), adapter)
    attached = quantised_base()
    load_weights(attached.model, adapter, where="test")
    assert mixed == answers(attached, None)
    assert mixed != answers(quantised_base(), None)


def test_a_lone_adapter_is_not_merged_into_codes(monkeypatch):
    base = quantised_base()
    adapter = random_adapter(tiny_base("phi3").model, rank=4, seed=1)
    layers = MixedLayers(base.model)
    layers.place(1, adapter.updates)
    layers.merge(1, 1 << 40)
    assert layers.mix.merged_seat == 0
    layers.remove()
    whole = []
    monkeypatch.setattr(QuantizedLinear, "weight", property(lambda self: whole.append(self)))
    assert answers(base, adapter, merged_bytes=1 << 40) == answers(quantised_base(), adapter)
    assert not whole
