"""A linear layer with a low-rank update beside its frozen weight.

Knows nothing of which layers of a model are adapted, or of files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from phinetune.lora.frozen import features, frozen_weight, is_transposed, kind_of
from phinetune.lora.function import dropout_threshold, lora_linear
from phinetune.lora.weights import Update


class LoraLinear(nn.Module):
    """Takes the place of an `nn.Linear` (also a transposed `Conv1D` or a quantised one) and adds s · B A.

    `lora_A` (rank, in_features) and `lora_B` (out_features, rank) are float32 and trained; the
    wrapped layer stays as it is. B starts at zero, so a fresh layer answers exactly as the base.

    >>> layer = LoraLinear(nn.Linear(4, 3), rank=2, scaling=1.0)
    >>> x = torch.ones(1, 4)
    >>> bool((layer(x) == layer.base(x)).all())
    True
    """

    def __init__(self, base: nn.Module, *, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.is_transposed = is_transposed(base)
        self.out_features, self.in_features = features(base)
        self.rank, self.scaling, self.threshold = rank, scaling, dropout_threshold(dropout)
        self.is_enabled = True
        _, device = kind_of(base)
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def reset(self, generator: torch.Generator) -> None:
        """A uniform in ±1/√in_features (Kaiming with a = √5, as loralib and PEFT), B zero."""
        bound = 1 / math.sqrt(self.in_features)
        with torch.no_grad():
            drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
            self.lora_A.copy_(drawn)
            self.lora_B.zero_()

    @property
    def weight_OI(self) -> Tensor:
        """The frozen weight as (out_features, in_features); of a quantised base formed for this call."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight.t() if self.is_transposed else weight

    def delta_OI(self) -> Tensor:
        """The update s · B A in float32, (out_features, in_features)."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained weights by their names in files."""
        yield "lora_A", self.lora_A
        yield "lora_B", self.lora_B

    def fixed(self) -> Iterator[tuple[str, Tensor]]:
        """What belongs to the layer's state and is not trained."""
        return iter(())

    def num_copied(self, dtype: torch.dtype) -> int:
        """The numbers of A and B that a forward pass in this type keeps as copies."""
        return 0 if dtype == self.lora_A.dtype else self.lora_A.numel() + self.lora_B.numel()

    def update(self) -> Update:
        """A copy of the weights on the CPU, as a file holds them."""
        a_RI, b_OR = (weight.detach().to("cpu", copy=True) for weight in (self.lora_A, self.lora_B))
        return Update(a_RI=a_RI, b_OR=b_OR, scaling=self.scaling)

    def take(self, update: Update) -> None:
        """Set the weights to those of an update of this shape."""
        with torch.no_grad():
            self.lora_A.copy_(update.a_RI)
            self.lora_B.copy_(update.b_OR)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_enabled:
            base_out = self.base(x)
            assert isinstance(base_out, Tensor)
            return base_out
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        threshold = self.threshold if self.training else 0
        weight = frozen_weight(self.base)
        return lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scaling, threshold)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {self.rank}, scaling {self.scaling:g}"
