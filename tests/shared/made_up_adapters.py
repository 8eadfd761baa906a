"""Adapters with weights that are not zero, on tiny models, and what a model answers with them."""

from __future__ import annotations

import torch
from tiny_models import VOCAB, tiny_model

from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.files import load_weights
from phinetune.lora.weights import AdapterWeights, Update


def made_up(name="phi3", *, rank=4, alpha=8.0, targets=None, seed=0, num_key_value_heads=None, **settings):
    """The weights of an adapter that changes every answer."""
    changes = {"num_key_value_heads": num_key_value_heads} if num_key_value_heads else {}
    settings = LoraSettings(rank=rank, alpha=alpha, target_modules=targets, **settings)
    adapter = attach(tiny_model(name, **changes), settings, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for path, layer in adapter.layers.items():
        b_OR = torch.randn(layer.lora_B.shape, generator=generator) * 0.05
        updates[path] = Update(a_RI=layer.lora_A.detach().clone(), b_OR=b_OR, scaling=layer.scaling)
    return AdapterWeights(
        updates=updates,
        settings=settings,
        base_name="the base",
        is_transposed=name == "gpt2",
        metadata={"base_sha256": "b" * 64, "step": "3"},
    )


def logits(model):
    ids = torch.arange(3, 23)[None] % VOCAB
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def logits_with(weights, name="phi3", **changes):
    model = tiny_model(name, **changes)
    load_weights(model, weights, where="a test")
    return logits(model)


def same_tensors(one, two):
    """Whether two adapters hold the same bytes for the same layers, with the same scales."""
    assert one.updates.keys() == two.updates.keys()
    for name, update in one.updates.items():
        other = two.updates[name]
        assert update.scaling == other.scaling
        for part, theirs in ((update.a_RI, other.a_RI), (update.b_OR, other.b_OR)):
            assert part.dtype == theirs.dtype
            assert torch.equal(part, theirs)
    return True
