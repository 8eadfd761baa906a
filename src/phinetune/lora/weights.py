"""An adapter apart from any model and any file form: the update of each layer, and the settings they follow.

All readers give this and all writers take it. Knows nothing of files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from phinetune.base.errors import AdapterError
from phinetune.lora.settings import LoraSettings

T = TypeVar("T", int, float)
# PEFT's words: a model that writes, or one with a classification head.
TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]
# The types of numbers that an adapter may hold.
KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """One layer's update s · B A: `a_RI` (rank, in), `b_OR` (out, rank).

    `magnitude_O` is there for DoRA: the rows of W + s · B A are then brought to these lengths.
    """

    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    magnitude_O: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    @property
    def in_features(self) -> int:
        return self.a_RI.shape[1]

    @property
    def out_features(self) -> int:
        return self.b_OR.shape[0]

    @property
    def num_parameters(self) -> int:
        magnitude = self.magnitude_O.numel() if self.magnitude_O is not None else 0
        return self.a_RI.numel() + self.b_OR.numel() + magnitude

    def delta_OI(self) -> Tensor:
        """s · B A in float32."""
        return self.scaling * (self.b_OR.float() @ self.a_RI.float())

    def merged_OI(self, weight_OI: Tensor) -> Tensor:
        """The layer's weight with the update in it, float32."""
        full = weight_OI.float() + self.delta_OI()
        if self.magnitude_O is not None:
            full *= (self.magnitude_O.float() / torch.linalg.norm(full, dim=1))[:, None]
        return full


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterWeights:
    """The updates by module path, in the order of the file; `settings` gives each its rank and scale."""

    updates: Mapping[str, Update]
    settings: LoraSettings
    base_name: str = ""
    is_transposed: bool = False
    task_type: TaskType = "CAUSAL_LM"
    metadata: Mapping[str, str] = field(default_factory=dict)
    # Biases, modules and rows of tokens, trained as they are: by the names of `Adapter.named_parameters`.
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def uses_dora(self) -> bool:
        return any(update.magnitude_O is not None for update in self.updates.values())

    @property
    def is_classifier(self) -> bool:
        """Whether it comes with a classification head, and answers with a class."""
        return self.task_type == "SEQ_CLS"

    @property
    def is_alone(self) -> bool:
        """Whether it changes the base itself, so that no batch can hold other adapters beside it."""
        return self.uses_dora or bool(self.whole)

    @property
    def num_parameters(self) -> int:
        num_whole = sum(tensor.numel() for tensor in self.whole.values())
        return sum(update.num_parameters for update in self.updates.values()) + num_whole

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last parts of the adapted modules' names, sorted."""
        return tuple(sorted({last(name) for name in self.updates}))

    @property
    def base_sha256(self) -> str:
        """The digest of the weights it was trained on; "" where its file does not say."""
        return self.metadata.get("base_sha256", "")

    def for_any_base(self) -> AdapterWeights:
        """The same adapter without the digest of its base: whatever has its names and shapes takes it."""
        return replace(self, metadata={key: v for key, v in self.metadata.items() if key != "base_sha256"})

    def with_updates(self, updates: Mapping[str, Update]) -> AdapterWeights:
        """The same adapter with other updates, and the settings that say their ranks and scales."""
        require_updates_only(self, "")
        settings = described(updates, dropout=self.settings.dropout)
        return replace(self, updates=dict(updates), settings=settings)

    def folded(self) -> AdapterWeights:
        """The same update with one alpha for all layers, for readers that know only alpha / rank.

        Where a layer's scale is not alpha / rank, the difference goes into its B, in float32.
        """
        alpha = _alpha(*_most_common(self.updates))
        updates = {}
        for name, update in self.updates.items():
            plain = alpha / update.rank
            factor = update.scaling / plain
            b_OR = update.b_OR if factor == 1 else update.b_OR.float() * factor
            updates[name] = replace(update, b_OR=b_OR, scaling=plain)
        return self.with_updates(updates)


def described(updates: Mapping[str, Update], *, dropout: float = 0.0) -> LoraSettings:
    """The settings that give these updates: what most layers have, and patterns for the others."""
    rank, scaling = _most_common(updates)
    alpha = _alpha(rank, scaling)
    ranks = {name: update.rank for name, update in updates.items()}
    alphas = {name: _alpha(update.rank, update.scaling) for name, update in updates.items()}
    return LoraSettings(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(alphas, alpha),
        use_dora=any(update.magnitude_O is not None for update in updates.values()),
    )


def require_updates_only(weights: AdapterWeights, where: str) -> None:
    """Raise `AdapterError` for an adapter that also holds weights trained whole."""
    require_no_head(weights, where)
    if weights.whole:
        names = sorted(weights.whole)
        raise AdapterError(
            f"the adapter holds more than updates: {names[0]}" + (", …" if len(names) > 1 else ""),
            where=where,
            why="biases, modules and token rows that were trained whole take the place of the base's own",
            do="merge it into the base: phinetune adapter merge",
        )


def require_no_head(weights: AdapterWeights, where: str) -> None:
    """Raise `AdapterError` for the adapter of a classifier."""
    if weights.is_classifier:
        raise AdapterError(
            "the adapter is a classifier's",
            where=where,
            why="it answers with its classification head alone, which has no place here",
            do="use it with phinetune evaluate, phinetune classify or phinetune.load_classifier",
        )


def checked(weights: AdapterWeights, where: str) -> AdapterWeights:
    """The adapter, when every tensor has its shape and finite values, and DoRA is on all layers or none."""
    if not weights.updates:
        raise AdapterError("the adapter holds no weights", where=where, do="use an earlier checkpoint")
    with_magnitude = [name for name, update in weights.updates.items() if update.magnitude_O is not None]
    for name, update in weights.updates.items():
        magnitude = update.magnitude_O
        if magnitude is None and with_magnitude:
            raise AdapterError(
                f"'{name}' has no magnitude, though '{with_magnitude[0]}' has one",
                where=where,
                why="DoRA is used on all layers of an adapter or on none",
                do="copy the file again",
            )
        _check_shapes(name, update, where)
        parts = {"lora_A": update.a_RI, "lora_B": update.b_OR, "magnitude": magnitude}
        for part, value in parts.items():
            if value is not None and value.dtype not in KINDS:
                raise AdapterError(
                    f"{part} of '{name}' holds numbers of type {str(value.dtype).removeprefix('torch.')}",
                    where=where,
                    why=f"an adapter's numbers are {', '.join(str(kind).split('.')[1] for kind in KINDS)}",
                    do="use the adapter as it was before it was quantised",
                )
            if value is not None and not torch.isfinite(value).all():
                raise AdapterError(
                    f"{part} of '{name}' holds NaN or infinite values",
                    where=where,
                    do="use an earlier checkpoint",
                )
    for name, tensor in weights.whole.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"'{name}' holds NaN or infinite values", where=where, do="use an earlier checkpoint"
            )
    return weights


def _check_shapes(name: str, update: Update, where: str) -> None:
    a, b, magnitude = update.a_RI, update.b_OR, update.magnitude_O
    is_sound = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] > 0 and a.shape[1] > 0 < b.shape[0]
    is_sound = is_sound and (magnitude is None or magnitude.shape == b.shape[:1])
    if not is_sound or not math.isfinite(update.scaling):
        raise AdapterError(
            f"the tensors of '{name}' do not fit each other",
            where=where,
            why=f"A is {tuple(a.shape)}, B {tuple(b.shape)}"
            + (f", the magnitude {tuple(magnitude.shape)}" if magnitude is not None else "")
            + f", the scale {update.scaling}; they must be (rank, in), (out, rank), (out,)",
            do="copy the file again; updates of convolutions and embeddings are not supported",
        )


def last(name: str) -> str:
    """The last part of a module's path."""
    return name.rsplit(".", 1)[-1]


def _most_common(updates: Mapping[str, Update]) -> tuple[int, float]:
    pairs = Counter((update.rank, update.scaling) for update in updates.values())
    return pairs.most_common(1)[0][0]


def _alpha(rank: int, scaling: float) -> float:
    """rank · scaling, without the last bit's noise where the round number gives the same scale."""
    tidy = round(rank * scaling, 6)
    return tidy if tidy / rank == scaling else rank * scaling


def _pattern(values: Mapping[str, T], usual: T) -> dict[str, T]:
    """By last part of the name where all layers of that name agree, else by whole name."""
    pattern: dict[str, T] = {}
    for name, value in values.items():
        same = {other for key, other in values.items() if last(key) == last(name)}
        if len(same) == 1 and value != usual:
            pattern[last(name)] = value
        elif len(same) > 1:
            pattern[f"^{name}"] = value
    return pattern
