"""Muon for hidden matrices: momentum whose matrix is brought close to orthogonal. Knows no model.

Fused projections (query, key and value; gate and up) are treated as the separate matrices they hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix_OI: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest matrix with singular values near 1, in bf16."""
    a, b, c = QUINTIC
    x = matrix_OI.bfloat16()
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.T if tall else x).to(matrix_OI.dtype)
    return result


class Muon(Optimizer):
    """`params` are (weight, parts) pairs; the update of each part has RMS 0.2, as AdamW's typically has."""

    owned: tuple[int, int] = (0, 1)  # updates matrices i with i % owned[1] == owned[0] only

    def __init__(
        self,
        params: Iterable[tuple[Tensor, int]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ):
        pairs = list(params)
        self._parts = {id(weight): parts for weight, parts in pairs}
        super().__init__(
            [weight for weight, _ in pairs], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients in place."""
        for group in self.param_groups:
            for index, weight in enumerate(group["params"]):
                if index % self.owned[1] != self.owned[0]:
                    continue
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                buffer = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                look_ahead = weight.grad.lerp(buffer, group["momentum"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                for part, target in zip(
                    look_ahead.chunk(self._parts[id(weight)]),
                    weight.chunk(self._parts[id(weight)]),
                    strict=True,
                ):
                    scale = 0.2 * max(part.shape) ** 0.5
                    target.add_(orthogonalised(part), alpha=-group["lr"] * scale)
