"""The learning rate of each step. Knows nothing of optimizers."""

from __future__ import annotations

import math

from phinetune.training.settings import SchedulerType


def learning_rate_factor(step: int, num_steps: int, kind: SchedulerType, num_warmup_steps: int) -> float:
    """The share of the peak rate at a step counted from 0, as transformers' schedules give it.

    `linear` and `cosine` fall from 1 at step 0 to 0 at `num_steps`; with warm-up they rise from 0
    to 1 over `num_warmup_steps` first.

    >>> [learning_rate_factor(step, 4, "linear", 400) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    warmup = num_warmup_steps if kind.endswith("_with_warmup") else 0
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    if kind.startswith("cosine"):
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress
