"""Products with a frozen weight, be it a tensor or a layer that forms its weight tile by tile.

    # T tokens, I inputs, O outputs

A tiled layer keeps its weight in fewer bits. A tile is formed, used and dropped while it is still in the
processor's cache, so that the whole weight never exists, neither forward nor backward.
Knows nothing of how a layer keeps its weight, of adapters or of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from phinetune.kernels.products import product_of, products_for


class TiledLinear(nn.Module):
    """A frozen linear layer without a weight tensor: `tile` gives any part of it.

    `is_transposed` says that the original is a `Conv1D`, whose weight is (in, out).
    """

    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, dtype: torch.dtype, is_transposed: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.is_transposed = dtype, is_transposed

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """The part of the weight (out, in) in these rows and columns, in `dtype`."""
        raise NotImplementedError

    def row_tiles(self) -> Iterator[slice]:
        """The rows of each tile of all columns."""
        raise NotImplementedError

    def column_tiles(self) -> Iterator[slice]:
        """The columns of each tile of all rows."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The whole weight in the form of the original, made anew each time: for code that must see it."""
        whole_OI = self.tile(slice(0, self.out_features), slice(0, self.in_features))
        return whole_OI.t() if self.is_transposed else whole_OI

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


FrozenWeight = Tensor | TiledLinear


def product(x_TI: Tensor, weight: FrozenWeight, bias_O: Tensor | None) -> Tensor:
    """x Wᵀ + b, (T, O)."""
    if isinstance(weight, Tensor):
        if products := products_for(x_TI, weight.t()):
            return products.multiply(x_TI, weight.t(), bias_N=bias_O)
        return torch.nn.functional.linear(x_TI, weight, bias_O)
    y_TO = x_TI.new_empty(len(x_TI), weight.out_features)
    columns = slice(0, weight.in_features)
    for rows in weight.row_tiles():
        product_of(x_TI, weight.tile(rows, columns).t(), out=y_TO[:, rows])
    return y_TO if bias_O is None else y_TO.add_(bias_O)


def product_back(dy_TO: Tensor, weight: FrozenWeight) -> Tensor:
    """dy W, (T, I): the gradient of x. Tiles are columns here, so that no sum is split and rounded twice."""
    if isinstance(weight, Tensor):
        return product_of(dy_TO, weight)
    dx_TI = dy_TO.new_empty(len(dy_TO), weight.in_features)
    rows = slice(0, weight.out_features)
    for columns in weight.column_tiles():
        product_of(dy_TO, weight.tile(rows, columns), out=dx_TI[:, columns])
    return dx_TI


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight: FrozenWeight, bias_O: Tensor | None) -> Tensor:
        kept = isinstance(weight, Tensor)
        ctx.save_for_backward(*((weight,) if kept else ()))
        ctx.layer = None if kept else weight
        return product(x_TI, weight, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, None, None]:
        weight = ctx.saved_tensors[0] if ctx.layer is None else ctx.layer
        return (product_back(dy_TO, weight) if ctx.needs_input_grad[0] else None), None, None


def frozen_linear(x: Tensor, weight: FrozenWeight, bias_O: Tensor | None) -> Tensor:
    """x Wᵀ + b for x of shape (..., I), with a gradient for x alone."""
    y_TO: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias_O)
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear: plain, GPT-2's transposed `Conv1D`, or tiled."""
    return isinstance(layer, nn.Linear | TiledLinear) or type(layer).__name__ == "Conv1D"


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight of a linear layer is (in, out) in files."""
    return layer.is_transposed if isinstance(layer, TiledLinear) else type(layer).__name__ == "Conv1D"


def features(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if isinstance(layer, TiledLinear):
        return layer.out_features, layer.in_features
    weight = layer.weight
    assert isinstance(weight, Tensor)
    out_features, in_features = weight.shape[::-1] if is_transposed(layer) else weight.shape
    return out_features, in_features


def frozen_weight(layer: nn.Module) -> FrozenWeight:
    """What `product` takes of a linear layer: its weight as (out, in), or the layer itself."""
    if isinstance(layer, TiledLinear):
        return layer
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_transposed(layer) else weight


def kind_of(layer: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Type and device that a linear layer computes in, without forming its weight."""
    if isinstance(layer, TiledLinear):
        return layer.dtype, layer.device
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.dtype, weight.device
