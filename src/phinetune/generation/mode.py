"""Put a base model into answering mode for a moment and leave it as it was found.

Knows nothing of batches, caches or text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from phinetune.models.loading import Base


@contextlib.contextmanager
def without_dropout(base: Base) -> Iterator[None]:
    """Every module in evaluation mode; those that were training train again at the end."""
    training = [module for module in base.model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def answering(base: Base) -> Iterator[None]:
    """No gradients, no dropout, ordinary causal attention; everything is put back at the end.

    Entered anew for each token, so that a paused stream never leaves a model changed.
    """
    with without_dropout(base), base.plain_attention(), torch.inference_mode():
        yield
