"""Put a model into answering mode for one forward pass and leave it as it was found.

Knows nothing of batches, caches or text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# Attention functions of transformers that know key/value caches and padding.
_ORDINARY = frozenset({"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"})


@contextlib.contextmanager
def answering(model: Any) -> Iterator[None]:
    """No gradients, no dropout, ordinary causal attention; everything is put back at the end.

    Entered anew for each token, so that a paused stream never leaves a model changed.
    """
    training = [module for module in model.modules() if module.training]
    attention = model.config._attn_implementation
    try:
        for module in training:
            module.training = False
        if attention not in _ORDINARY:
            model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
        if attention not in _ORDINARY:
            model.set_attn_implementation(attention)
