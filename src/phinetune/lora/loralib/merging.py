"""What loralib's layers share: merging for evaluation, exact un-merging, state dicts in either state.

A merged layer keeps its frozen weight aside and puts the very same back: adding and subtracting an
update changes low bits, in bfloat16 visibly. Knows nothing of the shapes of the updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

# Beside the tensors of a state dict torch keeps notes of each module; ours says what `weight` holds.
MERGED_NOTE = "lora_merged"


class LoRALayer(nn.Module):
    """A layer with a frozen weight and a low-rank update, which `eval()` merges and `train()` takes out.

    `merged` says which state it is in; with `merge_weights=False` it never merges.
    """

    r: int
    lora_alpha: float
    merge_weights: bool
    merged: bool
    scaling: float

    def _set_up(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        self.r, self.lora_alpha, self.merge_weights = r, lora_alpha, merge_weights
        self.lora_dropout: nn.Module = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.scaling = lora_alpha / r if r > 0 else 0.0
        self.merged = False
        self._unmerged: Tensor | None = None
        self._mark_when_merged = (0, 0)
        self._is_loaded_weight_merged: bool | None = None
        register: Any = self.register_load_state_dict_post_hook
        register(_settle_after_loading)

    @property
    def has_lora(self) -> bool:
        """False for rank 0 and for a `MergedLinear` with nothing enabled: a plain layer."""
        return getattr(self, "lora_A", None) is not None

    @property
    def frozen(self) -> nn.Parameter:
        """The weight that the update belongs to."""
        weight = self.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def delta(self) -> Tensor:
        """The scaled update in float32 (float64 for float64 weights), in the layout of the weight."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode:
            self._unmerge()
        elif self.merge_weights:
            self._merge()
        return self

    @torch.no_grad()
    def _merge(self) -> None:
        if self.merged:
            return
        self.merged = True
        if self.has_lora:
            weight = self.frozen
            self._unmerged = weight.data
            weight.data = (weight.data + self.delta()).to(weight.dtype)
            self._mark_when_merged = (id(weight), weight._version)

    @torch.no_grad()
    def _unmerge(self) -> None:
        if not self.merged:
            return
        self.merged = False
        if self.has_lora:
            weight, kept = self.frozen, self._unmerged
            identity, version = self._mark_when_merged
            is_written = id(weight) == identity and weight._version != version
            if kept is not None and not is_written:
                weight.data = kept.to(weight)
            else:  # what was written into the merged weight stays, only the update leaves
                weight.data = (weight.data - self.delta()).to(weight.dtype)
        self._unmerged = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][MERGED_NOTE] = self.merged

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """First half of loading; `_settle_after_loading` is the second, when children are loaded too."""
        holds_weight = any(f"{prefix}{name}" in state_dict for name in ("weight", "conv.weight"))
        if holds_weight and self.has_lora:
            # Without a note: a plain layer's weight is unmerged; a LoRA layer's is as ours, like loralib.
            guess = self.merged and f"{prefix}lora_A" in state_dict
            self._is_loaded_weight_merged = bool(local_metadata.get(MERGED_NOTE, guess))
        if self.merged:
            self._unmerge()
            if self._is_loaded_weight_merged is None:
                self._is_loaded_weight_merged = False
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@torch.no_grad()
def _settle_after_loading(layer: Any, _: Any) -> None:
    is_merged, layer._is_loaded_weight_merged = layer._is_loaded_weight_merged, None
    if is_merged:
        layer.merged, layer._unmerged = True, None
        layer._unmerge()
    if is_merged is not None and not layer.training and layer.merge_weights:
        layer._merge()


def product(b: Tensor, a: Tensor) -> Tensor:
    """B A in float32 at least: a product in bfloat16 loses what training found."""
    kind = torch.promote_types(b.dtype, torch.float32)
    return b.to(kind) @ a.to(kind)


def reset_update(layer: LoRALayer) -> None:
    """A as `nn.Linear` starts its weight, B zero: a fresh layer answers as its base."""
    if layer.has_lora:
        a, b = layer.lora_A, layer.lora_B
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)
