"""loralib's `Linear`, `Embedding` and `MergedLinear`. Knows nothing of state dicts or of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.base.errors import SettingsError
from phinetune.lora.loralib.merging import LoRALayer, product, reset_update


class Linear(LoRALayer, nn.Linear):
    """y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ with s = lora_alpha / r; lora_A (r, in), lora_B (out, r).

    With `fan_in_fan_out` the weight is stored as (in, out).

    >>> layer = Linear(8, 4, r=2, lora_alpha=4)
    >>> [tuple(p.shape) for p in layer.parameters() if p.requires_grad]
    [(4,), (2, 8), (4, 2)]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self._set_up(r, lora_alpha, lora_dropout, merge_weights)
        self.fan_in_fan_out = fan_in_fan_out
        if r > 0:
            self.lora_A = nn.Parameter(self.weight.new_zeros((r, in_features)))
            self.lora_B = nn.Parameter(self.weight.new_zeros((out_features, r)))
            self.weight.requires_grad = False
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t()

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)
        reset_update(self)

    def delta(self) -> Tensor:
        return self.scaling * _turned(product(self.lora_B, self.lora_A), self.fan_in_fan_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.linear(x, _turned(self.weight, self.fan_in_fan_out), self.bias)
        if not self.has_lora or self.merged:
            return out
        update: Tensor = self.lora_dropout(x) @ self.lora_A.t() @ self.lora_B.t()
        return out + update * self.scaling


class Embedding(LoRALayer, nn.Embedding):
    """Rows of E + s · (B A)ᵀ; lora_A (r, num_embeddings) starts at zero, lora_B (embedding_dim, r) normal."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        # A look-up with max_norm shortens base and update each for itself: one merged table would differ.
        self._set_up(r, lora_alpha, 0.0, merge_weights and self.max_norm is None)
        if r > 0:
            self.lora_A = nn.Parameter(self.weight.new_zeros((r, num_embeddings)))
            self.lora_B = nn.Parameter(self.weight.new_zeros((embedding_dim, r)))
            self.weight.requires_grad = False
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:
            self._reset_update()

    def reset_parameters(self) -> None:
        nn.Embedding.reset_parameters(self)
        self._reset_update()

    def _reset_update(self) -> None:
        if hasattr(self, "lora_A"):
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def delta(self) -> Tensor:
        return self.scaling * product(self.lora_B, self.lora_A).t()

    def forward(self, x: Tensor) -> Tensor:
        out = nn.Embedding.forward(self, x)
        if not self.has_lora or self.merged:
            return out
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        return out + (F.embedding(x, self.lora_A.t(), *options) @ self.lora_B.t()) * self.scaling


class MergedLinear(LoRALayer, nn.Linear):
    """Several projections in one weight (query, key and value, say), each with an update of its own or none.

    `enable_lora` has one entry per part. lora_A (r · number enabled, in), lora_B (outputs of the
    enabled parts, r). `out_splits` gives the parts' outputs where they are not equal: grouped-query
    attention has 3072, 1024, 1024, for example. With nothing enabled it is a plain linear layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        out_splits: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self._set_up(r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora = list(enable_lora)
        self.out_splits = _checked_splits(out_features, self.enable_lora, out_splits)
        self.fan_in_fan_out = fan_in_fan_out
        num_enabled = sum(self.enable_lora)
        if r > 0 and num_enabled:
            self.lora_A = nn.Parameter(self.weight.new_zeros((r * num_enabled, in_features)))
            self.lora_B = nn.Parameter(self.weight.new_zeros((sum(self._enabled_splits), r)))
            self.weight.requires_grad = False
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t()

    @property
    def _enabled_splits(self) -> list[int]:
        return [size for size, on in zip(self.out_splits, self.enable_lora, strict=True) if on]

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)
        reset_update(self)

    def delta(self) -> Tensor:
        parts_a = iter(self.lora_A.split(self.r))
        parts_b = iter(self.lora_B.split(self._enabled_splits))
        rows = [
            product(next(parts_b), next(parts_a)) if on else self.lora_A.new_zeros((size, self.in_features))
            for size, on in zip(self.out_splits, self.enable_lora, strict=True)
        ]
        return self.scaling * _turned(torch.cat([row.to(rows[0].dtype) for row in rows]), self.fan_in_fan_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.linear(x, _turned(self.weight, self.fan_in_fan_out), self.bias)
        if not self.has_lora or self.merged:
            return out
        low = iter((self.lora_dropout(x) @ self.lora_A.t()).split(self.r, dim=-1))
        parts_b = iter(self.lora_B.split(self._enabled_splits))
        update = [
            next(low) @ next(parts_b).t() if on else out.new_zeros((*out.shape[:-1], size))
            for size, on in zip(self.out_splits, self.enable_lora, strict=True)
        ]
        return out + torch.cat(update, dim=-1) * self.scaling


def _turned(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    return weight.t() if fan_in_fan_out else weight


def _checked_splits(out_features: int, enable_lora: list[bool], splits: Sequence[int] | None) -> list[int]:
    if splits is None and enable_lora and out_features % len(enable_lora) == 0:
        return [out_features // len(enable_lora)] * len(enable_lora)
    if splits is not None and len(splits) == len(enable_lora) and sum(splits) == out_features:
        return list(splits)
    raise SettingsError(
        "the parts of the merged layer do not fill its outputs",
        where="enable_lora" if splits is None else "out_splits",
        why=f"{out_features} outputs, {len(enable_lora)} entries of enable_lora, out_splits {splits}",
        do="give out_splits one size per entry of enable_lora, adding up to out_features",
    )
