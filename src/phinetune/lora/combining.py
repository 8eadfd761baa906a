"""Add adapters of one base: concatenated exactly, averaged factor by factor, or exactly and cut to a rank.

Knows nothing of models or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from phinetune.base.errors import AdapterError
from phinetune.lora.weights import AdapterWeights, Update, require_updates_only

_OF_BASE = ("base_sha256", "base_name")


def concatenated(adapters: Sequence[AdapterWeights], factors: Sequence[float]) -> AdapterWeights:
    """Σ factor · s · B A, exactly: the ranks add up. PEFT calls it `cat`."""
    updates = {name: _cat(found, weights) for name, found, weights in _by_layer(adapters, factors)}
    return _sum_of(adapters, updates)


def linear(adapters: Sequence[AdapterWeights], factors: Sequence[float]) -> AdapterWeights:
    """A and B weighted one by one by √|factor · s|, the sign on A, as PEFT's `linear`: keeps the rank.

    It is not the sum. Raises `AdapterError` unless the ranks are the same.
    """
    updates = {}
    for name, found, weights in _by_layer(adapters, factors):
        if len({update.rank for update in found}) > 1:
            raise AdapterError(
                f"the adapters cannot be combined linearly at '{name}'",
                why=f"their ranks {', '.join(str(update.rank) for update in found)} must be the same",
                do="use cat, which is exact for any ranks",
            )
        scales = [factor * update.scaling for update, factor in zip(found, weights, strict=True)]
        parts_a = [
            math.copysign(abs(s) ** 0.5, s) * u.a_RI.float() for s, u in zip(scales, found, strict=True)
        ]
        parts_b = [abs(s) ** 0.5 * u.b_OR.float() for s, u in zip(scales, found, strict=True)]
        updates[name] = Update(a_RI=_sum(parts_a), b_OR=_sum(parts_b), scaling=1.0)
    return _sum_of(adapters, updates)


def reranked(weights: AdapterWeights, rank: int) -> tuple[AdapterWeights, Mapping[str, float]]:
    """The nearest adapter of at most this rank, and by layer how much of the update's size it loses, 0 to 1.

    The singular values are those of the small product of two triangles: W-sized matrices are never formed.
    """
    updates, losses = {}, {}
    for name, update in weights.updates.items():
        if update.magnitude_O is not None:
            raise AdapterError("DoRA updates cannot be cut to a rank", why=name, do="merge it into its base")
        q_b, r_b = torch.linalg.qr(update.b_OR.double())
        q_a, r_a = torch.linalg.qr(update.a_RI.double().t())
        u, sizes, v = torch.linalg.svd(update.scaling * r_b @ r_a.t())
        kept = min(rank, len(sizes))
        root = sizes[:kept].sqrt()
        updates[name] = Update(
            a_RI=(root[:, None] * (v[:kept] @ q_a.t())).float(),
            b_OR=((q_b @ u[:, :kept]) * root).float(),
            scaling=1.0,
        )
        total = sizes.square().sum()
        losses[name] = float((sizes[kept:].square().sum() / total).sqrt()) if total else 0.0
    return weights.with_updates(updates), losses


def _sum_of(adapters: Sequence[AdapterWeights], updates: Mapping[str, Update]) -> AdapterWeights:
    """A sum belongs to the base of its parts, and is no longer what one run trained."""
    metadata: dict[str, str] = {}
    for adapter in adapters:
        metadata = {key: adapter.metadata[key] for key in _OF_BASE if key in adapter.metadata} | metadata
    base_name = next((adapter.base_name for adapter in adapters if adapter.base_name), "")
    return replace(adapters[0].with_updates(updates), metadata=metadata, base_name=base_name)


def _by_layer(
    adapters: Sequence[AdapterWeights], factors: Sequence[float]
) -> list[tuple[str, list[Update], list[float]]]:
    if not adapters or len(adapters) != len(factors):
        raise AdapterError(
            "every adapter needs one factor",
            why=f"{len(adapters)} adapters, {len(factors)} factors",
            do="give as many factors as adapters",
        )
    hashes = {adapter.metadata.get("base_sha256", "") for adapter in adapters} - {""}
    if len(hashes) > 1:
        raise AdapterError(
            "the adapters belong to different bases",
            why=", ".join(sorted(f"{digest[:12]}…" for digest in hashes)),
            do="add only adapters of one base",
        )
    for adapter in adapters:
        require_updates_only(adapter, "")
    rows = []
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.updates):
        pairs = [(a.updates[name], f) for a, f in zip(adapters, factors, strict=True) if name in a.updates]
        found = [update for update, _ in pairs]
        if any(update.magnitude_O is not None for update in found):
            raise AdapterError("DoRA adapters cannot be added", why=name, do="merge one into its base first")
        if len({(update.in_features, update.out_features) for update in found}) > 1:
            raise AdapterError(
                f"the updates of '{name}' have different shapes", do="add only adapters of one base"
            )
        rows.append((name, found, [factor for _, factor in pairs]))
    return rows


def _cat(found: Sequence[Update], factors: Sequence[float]) -> Update:
    blocks = [u.b_OR.float() * (factor * u.scaling) for u, factor in zip(found, factors, strict=True)]
    a_RI = torch.cat([update.a_RI.float() for update in found])
    return Update(a_RI=a_RI, b_OR=torch.cat(blocks, dim=1), scaling=1.0)


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total
