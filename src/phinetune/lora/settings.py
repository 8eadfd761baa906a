"""How much each adapted layer may say: rank and scale, for all layers or by name.

Knows nothing of models or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Bias = Literal["none", "lora_only", "all"]
# What `init_lora_weights` may say: the words, and a number of iterations in one of them.
STARTS = r"paper|gaussian|pissa|pissa_niter_[1-9][0-9]?|olora"
_STARTS_IN_BASE = ("pissa", "olora")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Which layers learn, and how much they may say.

    The update is scaled by alpha / rank, with `use_rslora` by alpha / √rank (arXiv 2312.03732).
    `rank_pattern` and `alpha_pattern` give single layers values of their own: a key is the end of a
    layer's name at a dot (`o_proj`, `layers.0.mlp.down_proj`), or with `^` the whole name; the first
    that fits counts, as in PEFT. `layers_to_transform` leaves only layers in blocks of these numbers;
    `layers_pattern` says in which lists of blocks, where a model has several. `use_dora` and
    `init_lora_weights` (one of `STARTS`) choose another kind of layer. `bias`, `modules_to_save` and
    `trainable_token_indices` name weights that are trained whole beside the updates.

    >>> settings = LoraSettings(rank=8, alpha=16, rank_pattern={"o_proj": 4})
    >>> settings.scaling_of("model.layers.0.self_attn.o_proj"), settings.scaling_of("qkv_proj")
    (4.0, 2.0)
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    use_dora: bool = False
    init_lora_weights: str = "paper"
    bias: Bias = "none"
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] = ()

    @property
    def scaling(self) -> float:
        """The scale of the layers that no pattern names."""
        return self._scale(self.alpha, self.rank)

    @property
    def starts_in_base(self) -> bool:
        """Whether A and B begin with a part of the base's weights."""
        return self.init_lora_weights.startswith(_STARTS_IN_BASE)

    @property
    def has_whole(self) -> bool:
        """Whether weights of the base are trained beside the updates."""
        return self.bias != "none" or bool(self.modules_to_save or self.trainable_token_indices)

    @property
    def method(self) -> str:
        """What is not plain LoRA, in the words of its papers; "" when all is.

        >>> LoraSettings(use_dora=True, use_rslora=True).method
        'DoRA, rsLoRA'
        """
        names = (("DoRA", self.use_dora), ("rsLoRA", self.use_rslora))
        begun = "" if self.init_lora_weights == "paper" else f"begun with {self.init_lora_weights}"
        return ", ".join([*(name for name, is_on in names if is_on), *([begun] if begun else [])])

    def rank_of(self, name: str) -> int:
        """The rank of the layer at this path."""
        return next((rank for key, rank in self.rank_pattern.items() if fits(name, key)), self.rank)

    def scaling_of(self, name: str) -> float:
        """The scale of the layer at this path."""
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if fits(name, key)), self.alpha)
        return self._scale(alpha, self.rank_of(name))

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def fits(name: str, key: str) -> bool:
    """Whether a key of a pattern means the layer at this path."""
    return name == key.removeprefix("^") or name.endswith(f".{key}")
