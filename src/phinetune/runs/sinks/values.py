"""The numbers of an event, by the names that other tools show. Knows nothing of these tools."""

from __future__ import annotations

import math
from collections.abc import Mapping

from phinetune.base.events import Compared, Evaluated, Event, Stepped


def values_of(event: Event) -> dict[str, float]:
    """The finite numbers of a step, an evaluation or the comparison; empty for other events.

    >>> values_of(Evaluated(step=0, epoch=0.0, loss=2.5, token_accuracy=0.5, num_trained_tokens=9,
    ...                     is_best=False, seconds=1.0))
    {'eval/loss': 2.5, 'eval/token_accuracy': 0.5}
    """
    found: dict[str, float | None] = {}
    if isinstance(event, Stepped):
        found = {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/epoch": event.epoch,
            "train/tokens_per_second": event.num_tokens / event.seconds if event.seconds > 0 else None,
        }
    elif isinstance(event, Evaluated):
        found = {"eval/loss": event.loss, "eval/token_accuracy": event.token_accuracy}
    elif isinstance(event, Compared):
        for side in ("base", "adapter"):
            metrics: Mapping[str, float | None] = event.evaluation[side]
            found |= {f"compare/{metric}/{side}": value for metric, value in metrics.items()}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}
