"""DoRA: the update turns the rows of the weight, a trained magnitude says how long they are.

    V = W + s · B A        y = (m / ‖V‖) ∘ (V x) + b        DoRA (arXiv 2402.09353), section 4

with ‖V‖ by row, and constant to the gradient (section 4.3). As in PEFT, dropout takes entries away from
the part that training changes alone:

    y = W x + b + (g - 1) ∘ W x' + g ∘ s · B A x'           g = m / ‖V‖, x' = dropout(x)

    # T tokens, I inputs, O outputs, R rank

Like the plain layer it keeps nothing of size T x O or O x I: ‖V‖² = ‖W‖² + 2 s B·(W Aᵀ) + s² B (A Aᵀ) Bᵀ
row by row, and the gradient of m computes V x' once more. Knows nothing of names or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from phinetune.base.errors import SettingsError
from phinetune.lora.dropout import drawn_mask, drop_, dropped
from phinetune.lora.frozen import product, product_back
from phinetune.lora.layers import LoraLinear
from phinetune.lora.weights import Update

# Rows of W whose squares are summed at once, in float32.
_ROWS_AT_ONCE = 1024


class DoraLinear(LoraLinear):
    """A `LoraLinear` with `lora_magnitude_vector` (out_features,), float32 and trained.

    A fresh layer's magnitudes are the lengths of the base's rows, so it answers as the base.

    >>> layer = DoraLinear(nn.Linear(4, 3), rank=2, scaling=1.0)
    >>> layer.reset(torch.Generator().manual_seed(0))
    >>> x = torch.ones(1, 4)
    >>> torch.allclose(layer(x), layer.base(x))
    True
    """

    def __init__(self, base: nn.Module, *, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank=rank, scaling=scaling, dropout=dropout)
        self._base_squares_O = _row_squares(self.weight_OI)
        self.lora_magnitude_vector = nn.Parameter(self._base_squares_O.sqrt())
        self._norms: tuple[tuple[int, int], Tensor] | None = None

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().trained()
        yield "lora_magnitude_vector", self.lora_magnitude_vector

    def reset(self, generator: torch.Generator) -> None:
        super().reset(generator)
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self._base_squares_O.sqrt())

    def update(self) -> Update:
        magnitude_O = self.lora_magnitude_vector.detach().to("cpu", copy=True)
        plain = super().update()
        return Update(a_RI=plain.a_RI, b_OR=plain.b_OR, scaling=plain.scaling, magnitude_O=magnitude_O)

    def take(self, update: Update) -> None:
        super().take(update)
        assert update.magnitude_O is not None
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(update.magnitude_O)

    def train(self, mode: bool = True) -> DoraLinear:
        self._norms = None
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_enabled:
            return super().forward(x)
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        flat_TI = x.reshape(-1, x.shape[-1])
        y_TO: Tensor = _DoraLinear.apply(
            flat_TI,
            self.weight_OI,
            bias,
            self.lora_A,
            self.lora_B,
            self.lora_magnitude_vector,
            self._row_norms(),
            self.scaling,
            self.threshold if self.training else 0,
        )
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """‖V‖ by row; a model that answers asks for the same one at every token."""
        state = self.lora_A._version, self.lora_B._version
        if self.training or self._norms is None or self._norms[0] != state:
            squares_O = self._squares()
            # The least float above 0: a row of zeros has no direction, and is to stay one of zeros.
            self._norms = state, squares_O.clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()
        return self._norms[1]

    def _squares(self) -> Tensor:
        weight_OI = self.weight_OI
        a, b = self.lora_A.to(weight_OI.dtype), self.lora_B
        cross_OR = (weight_OI @ a.t()).float()
        gram_RR = a.float() @ a.float().t()
        added_OR = self.scaling * b
        return self._base_squares_O + (added_OR * (2 * cross_OR + added_OR @ gram_RR)).sum(1)


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        magnitude_O: Tensor,
        norm_O: Tensor,
        scaling: float,
        threshold: int,
    ) -> Tensor:
        a, b = a_RI.to(x_TI.dtype), b_OR.to(x_TI.dtype)
        gain_O = magnitude_O / norm_O
        mask, ctx.factor = drawn_mask(x_TI, threshold)
        dropped_TI = x_TI if mask is None else dropped(x_TI, mask)
        u_TR = dropped_TI @ a.t()
        ctx.scale = scaling * ctx.factor
        v_TO = product(dropped_TI, weight_OI, None)
        if mask is None:
            y_TO = _times(v_TO.addmm_(u_TR, b.t(), alpha=ctx.scale), gain_O)
            if bias_O is not None:
                y_TO += bias_O
        else:
            v_TO.mul_(ctx.factor).addmm_(u_TR, b.t(), alpha=ctx.scale)
            y_TO = product(x_TI, weight_OI, bias_O).addmm_(u_TR, b.t(), alpha=ctx.scale)
            y_TO.addcmul_(v_TO, (gain_O - 1).to(v_TO.dtype))
        ctx.save_for_backward(dropped_TI, mask, weight_OI, a, b, u_TR, gain_O, norm_O)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        dropped_TI, mask, weight_OI, a, b, u_TR, gain_O, norm_O = ctx.saved_tensors
        v_TO = product(dropped_TI, weight_OI, None).mul_(ctx.factor).addmm_(u_TR, b.t(), alpha=ctx.scale)
        dm_O = v_TO.mul_(dy_TO).sum(0, dtype=torch.float32).div_(norm_O)
        dv_TO = _times(dy_TO, gain_O)
        du_TR = (dv_TO @ b).mul_(ctx.scale)
        db_OR = (dv_TO.t() @ u_TR).float().mul_(ctx.scale)
        da_RI = (du_TR.t() @ dropped_TI).float()
        dx_TI = None
        if ctx.needs_input_grad[0]:
            if mask is None:
                dx_TI = product_back(dv_TO, weight_OI).addmm_(du_TR, a)
            else:
                changed_O = ((gain_O - 1) * ctx.factor).to(dy_TO.dtype)
                dx_TI = product_back(torch.mul(dy_TO, changed_O, out=dv_TO), weight_OI).addmm_(du_TR, a)
                drop_(dx_TI, mask)
                dx_TI.addmm_(dy_TO, weight_OI)
        dbias_O = dy_TO.sum(0) if ctx.needs_input_grad[2] else None
        return dx_TI, None, dbias_O, da_RI, db_OR, dm_O, None, None, None


def _times(v_TO: Tensor, gain_O: Tensor) -> Tensor:
    """v ∘ g for g in float32: in two terms, or a gain near 1 would be rounded to bfloat16's three digits."""
    first_O = gain_O.to(v_TO.dtype)
    out_TO = v_TO * first_O
    if v_TO.dtype != gain_O.dtype:
        out_TO.addcmul_(v_TO, (gain_O - first_O).to(v_TO.dtype))
    return out_TO


def _row_squares(weight_OI: Tensor) -> Tensor:
    """‖W‖² by row in float32, without a float32 copy of W."""
    if type(weight_OI.data).__name__ == "DTensor":
        raise SettingsError(
            "use_dora needs whole weights, and --shard divides them",
            where="use_dora",
            do="leave --shard out, or write use_dora: false",
        )
    with torch.no_grad():
        return torch.cat([part.float().square().sum(1) for part in weight_OI.split(_ROWS_AT_ONCE)])
