"""loralib's state dicts to and from `AdapterWeights`.

A state dict holds `<module>.lora_A` and `<module>.lora_B` and nothing else: alpha and the parts of a
`MergedLinear` must be told. Knows nothing of how the dict is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from phinetune.base.errors import AdapterError
from phinetune.lora.weights import AdapterWeights, Update, checked, described, last


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedParts:
    """The parts of a `MergedLinear`: outputs of each, and which have an update.

    >>> MergedParts.from_text("3072,-1024,1024")
    MergedParts(out_splits=(3072, 1024, 1024), enable_lora=(True, False, True))
    """

    out_splits: tuple[int, ...]
    enable_lora: tuple[bool, ...]

    @classmethod
    def from_text(cls, text: str) -> MergedParts:
        """Sizes with commas; a minus before one without an update. Raises `ValueError`."""
        sizes = [int(size) for size in text.split(",")]
        if 0 in sizes or not any(size > 0 for size in sizes):
            raise ValueError(text)
        return cls(out_splits=tuple(map(abs, sizes)), enable_lora=tuple(size > 0 for size in sizes))

    @property
    def num_enabled(self) -> int:
        return sum(self.enable_lora)

    @property
    def enabled_splits(self) -> tuple[int, ...]:
        return tuple(size for size, on in zip(self.out_splits, self.enable_lora, strict=True) if on)


def from_loralib(
    tensors: Mapping[str, Tensor],
    *,
    alpha: float,
    where: str,
    merged: Mapping[str, MergedParts] | None = None,
    fan_in_fan_out: bool = False,
) -> AdapterWeights:
    """The adapter of a state dict of loralib; biases in it are refused, for no other form holds them.

    `merged` says by last part of the name which layers are `MergedLinear`, and of which parts. Such a
    layer becomes one update of rank r · parts: A as it is, B block by block.
    """
    updates = {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        if part not in ("lora_A", "lora_B") or not name:
            raise AdapterError(
                f"the state dict holds '{key}', which is no part of an update",
                where=where,
                why="only the forms of loralib itself can keep biases and other weights beside A and B",
                do="save it with lora_state_dict(model, bias='none')",
            )
        if name in updates:
            continue
        pair = [tensors.get(f"{name}.{p}") for p in ("lora_A", "lora_B")]
        if pair[0] is None or pair[1] is None:
            missing = "lora_A" if pair[0] is None else "lora_B"
            raise AdapterError(f"'{name}' has no {missing}", where=where, do="save the state dict again")
        parts = (merged or {}).get(last(name))
        updates[name] = _joined(name, pair[0], pair[1], alpha, parts, where)
    if not updates:
        raise AdapterError(
            "the state dict holds no updates", where=where, do="save the model's lora_state_dict"
        )
    return checked(
        AdapterWeights(updates=updates, settings=described(updates), is_transposed=fan_in_fan_out), where
    )


def to_loralib(
    weights: AdapterWeights, *, where: str, merged: Mapping[str, MergedParts] | None = None
) -> tuple[dict[str, Tensor], float]:
    """The state dict and its `lora_alpha`; where layers differ in scale, it goes into their B first.

    An update of a `MergedLinear` whose parts share one A is written with that A once for each part.
    """
    if weights.uses_dora:
        raise AdapterError("loralib has no DoRA", where=where, do="merge the adapter into its base")
    found = {}
    for name, update in weights.updates.items():
        parts = (merged or {}).get(last(name))
        found[name] = (
            _separated(name, update, parts, where) if parts else (update.a_RI, update.b_OR, update.rank)
        )
    scales = {weights.updates[name].scaling * rank for name, (_, _, rank) in found.items()}
    alpha = scales.pop() if len(scales) == 1 else weights.folded().settings.alpha
    tensors = {}
    for name, (a, b, rank) in found.items():
        factor = weights.updates[name].scaling * rank / alpha
        tensors[f"{name}.lora_A"] = a.contiguous()
        tensors[f"{name}.lora_B"] = (b if factor == 1 else b.float() * factor).contiguous()
    return tensors, alpha


def _joined(name: str, a: Tensor, b: Tensor, alpha: float, parts: MergedParts | None, where: str) -> Update:
    if a.dim() != 2 or b.dim() != 2:
        return Update(a_RI=a, b_OR=b, scaling=0.0)  # refused by `checked`, with the shapes
    if parts is None:
        if a.shape[0] != b.shape[1] and a.shape[0] % b.shape[1] == 0:
            raise AdapterError(
                f"'{name}' looks like a MergedLinear with {a.shape[0] // b.shape[1]} enabled parts",
                where=where,
                why=f"A is {tuple(a.shape)}, B {tuple(b.shape)}",
                do=f"say its parts, for example --merged {last(name)}={_guess(a, b)}",
            )
        return Update(a_RI=a, b_OR=b, scaling=alpha / max(a.shape[0], 1))
    rank = b.shape[1]
    if a.shape[0] != rank * parts.num_enabled or b.shape[0] != sum(parts.enabled_splits):
        raise AdapterError(
            f"'{name}' does not have the parts that were told",
            where=where,
            why=f"A is {tuple(a.shape)}, B {tuple(b.shape)}; the parts are {parts.out_splits}",
            do="give the sizes of all parts, with a minus before those without an update",
        )
    full = b.new_zeros((sum(parts.out_splits), rank * parts.num_enabled))
    for (rows, columns), block in zip(_places(parts, rank), b.split(parts.enabled_splits), strict=True):
        full[rows, columns] = block
    return Update(a_RI=a, b_OR=full, scaling=alpha / rank)


def _separated(name: str, update: Update, parts: MergedParts, where: str) -> tuple[Tensor, Tensor, int]:
    """A, B and r as a `MergedLinear` of these parts has them."""
    if update.out_features != sum(parts.out_splits):
        raise AdapterError(
            f"'{name}' cannot have the parts {parts.out_splits}",
            where=where,
            why=f"it has {update.out_features} outputs",
            do="give the sizes of all parts of this layer",
        )
    rows = update.b_OR.split(parts.out_splits)
    if any(block.any() for block, on in zip(rows, parts.enable_lora, strict=True) if not on):
        raise AdapterError(
            f"the update of '{name}' changes a part that is told to have none",
            where=where,
            why=f"the parts are {parts.out_splits}, with an update or without: {parts.enable_lora}",
            do="leave out the minus before the sizes of the parts it changes",
        )
    rank, rest = divmod(update.rank, parts.num_enabled)
    outside = update.b_OR.clone()
    blocks = []
    for place in _places(parts, rank):
        blocks.append(update.b_OR[place])
        outside[place] = 0
    if not rest and not outside.any():
        return update.a_RI, torch.cat(blocks), rank
    kept = [block for block, on in zip(rows, parts.enable_lora, strict=True) if on]
    return update.a_RI.repeat(parts.num_enabled, 1), torch.cat(kept), update.rank


def _places(parts: MergedParts, rank: int) -> list[tuple[slice, slice]]:
    """Rows and columns of each enabled part in the whole B."""
    places: list[tuple[slice, slice]] = []
    row = 0
    for size, on in zip(parts.out_splits, parts.enable_lora, strict=True):
        if on:
            column = len(places) * rank
            places.append((slice(row, row + size), slice(column, column + rank)))
        row += size
    return places


def _guess(a: Tensor, b: Tensor) -> str:
    count = a.shape[0] // b.shape[1]
    return ",".join([str(b.shape[0] // count)] * count)
