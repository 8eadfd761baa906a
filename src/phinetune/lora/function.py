"""The arithmetic of one adapted linear layer, forward and backward, as one autograd function.

    y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ          LoRA (arXiv 2106.09685), section 4.1

    x_TI ──────────────── W_OI ───────────────(+)── y_TO
       └─ dropout ─ A_RI ── u_TR ── B_OR ── s ─┘

    # T tokens, I inputs, O outputs, R rank, s = alpha / R

Backward keeps dropout(x), its mask (one byte per entry) and u, and nothing of size T x O. W is frozen:
its gradient is never formed, and x itself is not needed. A and B may be float32 over a bfloat16 W;
products run in W's type. W may be kept in fewer bits: its tiles are then formed anew in the backward pass.
Knows nothing of modules, names or files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.lora.frozen import FrozenWeight, product, product_back

# Dropout draws one random byte per entry, so a rate is rounded to 1/256: 0.1 becomes 0.1016.
BYTE_VALUES = 256


def dropout_threshold(rate: float) -> int:
    """The number of byte values out of 256 that mean "drop" for a dropout rate; 0 only for a rate of 0.

    >>> dropout_threshold(0.1)
    26
    """
    return min(max(round(rate * BYTE_VALUES), rate > 0), BYTE_VALUES - 1)


def keep_mask(shape: torch.Size, threshold: int, device: torch.device) -> Tensor:
    """A mask of bytes, 0 with probability threshold / 256 and else 1, from torch's global generator.

    Eight bytes come from one 64-bit draw: nine times cheaper on a CPU than a draw per entry; and
    multiplying bfloat16 by bytes is 2.6 times cheaper there than by booleans.
    """
    if device.type not in ("cpu", "cuda"):  # others lack 64-bit draws
        share_kept = 1 - threshold / BYTE_VALUES
        return torch.empty(shape, dtype=torch.uint8, device=device).bernoulli_(share_kept)
    num_entries = shape.numel()
    words = torch.empty((num_entries + 7) // 8, dtype=torch.int64, device=device)
    words.random_(-(2**63), None)
    return (words.view(torch.uint8)[:num_entries] >= threshold).view(torch.uint8).view(shape)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: FrozenWeight,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
        threshold: int,
    ) -> Tensor:
        a = a_RI.to(x_TI.dtype)
        b = b_OR.to(x_TI.dtype)
        keep_TI = keep_mask(x_TI.shape, threshold, x_TI.device) if threshold else None
        scale = scaling * BYTE_VALUES / (BYTE_VALUES - threshold)
        dropped_TI = x_TI if keep_TI is None else x_TI * keep_TI
        u_TR = dropped_TI @ a.t()
        y_TO = product(x_TI, weight_OI, bias_O)
        y_TO.addmm_(u_TR, b.t(), alpha=scale)
        kept = weight_OI if isinstance(weight_OI, Tensor) else None
        ctx.save_for_backward(dropped_TI, keep_TI, kept, a, b, u_TR)
        ctx.tiled = weight_OI if kept is None else None
        ctx.scale = scale
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        dropped_TI, keep_TI, kept, a, b, u_TR = ctx.saved_tensors
        du_TR = (dy_TO @ b).mul_(ctx.scale)
        db_OR = (dy_TO.t() @ u_TR).float().mul_(ctx.scale)
        da_RI = (du_TR.t() @ dropped_TI).float()
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = product_back(dy_TO, ctx.tiled if kept is None else kept)
            if keep_TI is None:
                dx_TI.addmm_(du_TR, a)
            else:
                dx_TI.add_((du_TR @ a).mul_(keep_TI))
        dbias_O = dy_TO.sum(0) if ctx.needs_input_grad[2] else None  # only where biases are trained
        return dx_TI, None, dbias_O, da_RI, db_OR, None, None


def lora_linear(
    x: Tensor,
    weight_OI: FrozenWeight,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
    threshold: int,
) -> Tensor:
    """The adapted linear layer on `x` of shape (..., I), giving (..., O).

    `weight_OI` is frozen; gradients flow to x, A, B, and to a bias that wants one. `threshold` is a
    `dropout_threshold`, 0 for none; the mask comes from torch's global generator.
    """
    flat_TI = x.reshape(-1, x.shape[-1])
    y_TO: Tensor = _LoraLinear.apply(flat_TI, weight_OI, bias_O, a_RI, b_OR, scaling, threshold)
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])
