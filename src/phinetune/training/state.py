"""All that changes while a training runs. Knows nothing of how a step is made, or of files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from phinetune.lora.attach import Adapter


@dataclass(kw_only=True)
class Counters:
    """The counters of a training. Order, rates and dropout follow from settings, seed and `step`."""

    step: int = 0
    # The last step whose evaluation is done; -1 before the base has been measured.
    settled_step: int = -1
    best_step: int = 0
    best_loss: float = math.inf
    num_evaluations_without_improvement: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    seconds: float = 0.0
    # Half after a retry; every learning rate is multiplied by it.
    rate_factor: float = 1.0
    # How often the pieces of a step were halved because the device's memory was full.
    num_halvings: int = 0


@dataclass(kw_only=True)
class TrainState(Counters):
    """The counters, the adapter, its optimizer, and the best weights so far."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    # What the adapter began with, when that is not a function of the seed.
    first_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def begin_again(self, seed: int) -> None:
        """Back to before the first step."""
        if self.first_weights:
            self.adapter.restore(self.first_weights)
        else:
            self.adapter.reset(seed)
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self.best_weights = {}
        self.set_counters(Counters())

    def set_counters(self, counters: Counters) -> None:
        for name in Counters.__dataclass_fields__:
            setattr(self, name, getattr(counters, name))
