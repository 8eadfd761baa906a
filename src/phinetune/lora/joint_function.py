"""The adapted linear layer with frozen product and update in the same sums, in a CPU's tile registers.

The same arithmetic as `function.py`, and fewer passes over memory: dropout's mask is applied where factors
are laid out, so that dropout(x) is nowhere kept; the update is added before sums are rounded.

    u = s dropout(x) Aᵀ        y = x Wᵀ + u Bᵀ + b
    du = s dy B                dx = dy W + mask ∘ (du A)        dA = duᵀ dropout(x)      dB = dyᵀ u

# T tokens, I inputs, O outputs, R rank, s = alpha / R by the share of entries kept

Knows nothing of modules, names or files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels.products import Products, products_for
from phinetune.lora.dropout import drawn_mask


class JointLoraLinear(torch.autograd.Function):
    """Takes what `lora_linear` takes, if `products_for` has products for x and Wᵀ."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
        threshold: int,
    ) -> Tensor:
        products = _products(x_TI, weight_OI.t())
        a, b = a_RI.to(x_TI.dtype), b_OR.to(x_TI.dtype)
        mask, factor = drawn_mask(x_TI, threshold)
        ctx.scale = scaling * factor
        u_TR = products.multiply(x_TI, a.t(), left_mask=mask, scale=ctx.scale)
        ctx.save_for_backward(x_TI, mask, weight_OI, a, b, u_TR)
        return products.multiply(x_TI, weight_OI.t(), update=(u_TR, b.t()), bias_N=bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, mask, weight_OI, a, b, u_TR = ctx.saved_tensors
        dy_TO = dy_TO.contiguous()
        products = _products(dy_TO, weight_OI)
        du_TR = products.multiply(dy_TO, b, scale=ctx.scale)
        db_RO = _gradient(products, u_TR, dy_TO, None)
        da_RI = _gradient(products, du_TR, x_TI, mask)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = products.multiply(dy_TO, weight_OI, update=(du_TR, a), update_mask=mask)
        dbias_O = dy_TO.sum(0) if ctx.needs_input_grad[2] else None  # only where biases are trained
        return dx_TI, None, dbias_O, da_RI, db_RO.t(), None, None


def _products(left: Tensor, right: Tensor) -> Products:
    products = products_for(left, right)
    assert products is not None
    return products


def _gradient(products: Products, by_TR: Tensor, of_TN: Tensor, mask: Tensor | None) -> Tensor:
    """The sum over tokens, (R, N) in float32: so the large factor is read row by row."""
    out_RN = torch.empty(by_TR.shape[1], of_TN.shape[1])
    return products.multiply(by_TR.t().contiguous(), of_TN, right_mask=mask, out=out_RN)
