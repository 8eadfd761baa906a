"""Updates of q, k, v into that of `qkv_proj`, of gate and up into that of `gate_up_proj`, and back.

    W_qkv = | W_q |     s · B A of the fused layer:     | B_q         |   | A_q |
            | W_k |                                     |     B_k     | · | A_k |
            | W_v |                                     |         B_v |   | A_v |

Both ways exact. Knows nothing of models or files: the sizes of the parts are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from phinetune.base.errors import AdapterError
from phinetune.lora.weights import AdapterWeights, Update, last


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """A fused projection and the parts in the order of its rows."""

    fused: str
    parts: tuple[str, ...]


# As in Phi-3 and later Phi models.
QKV = Fusion(fused="qkv_proj", parts=("q_proj", "k_proj", "v_proj"))
GATE_UP = Fusion(fused="gate_up_proj", parts=("gate_proj", "up_proj"))
FUSIONS = (QKV, GATE_UP)


def fuse(weights: AdapterWeights, sizes: Mapping[str, Sequence[int]], *, where: str) -> AdapterWeights:
    """The adapter for the model with fused projections; `sizes` gives the rows of each part by fused name.

    A part without an update leaves its rows zero. Where all parts share one A (as after `split`), the
    rank stays; else the ranks add up. Scales that differ go into B.
    """
    updates: dict[str, Update] = {}
    for name, update in weights.updates.items():
        fusion = next((fusion for fusion in FUSIONS if last(name) in fusion.parts), None)
        if fusion is None:
            updates[name] = update
            continue
        path = name.removesuffix(last(name)) + fusion.fused
        if path not in updates:
            siblings = [name.removesuffix(last(name)) + part for part in fusion.parts]
            found = [weights.updates.get(sibling) for sibling in siblings]
            updates[path] = _stacked(path, found, sizes.get(fusion.fused, ()), where)
    return weights.with_updates(updates)


def split(weights: AdapterWeights, sizes: Mapping[str, Sequence[int]], *, where: str) -> AdapterWeights:
    """The adapter for the model with separate projections: every part gets A and its own rows of B.

    Parts that were stacked by `fuse` get back their own A; parts whose rows are all zero get nothing.
    """
    updates: dict[str, Update] = {}
    for name, update in weights.updates.items():
        fusion = next((fusion for fusion in FUSIONS if last(name) == fusion.fused), None)
        if fusion is None:
            updates[name] = update
            continue
        rows = _checked_sizes(
            name, sizes.get(fusion.fused, ()), len(fusion.parts), update.out_features, where
        )
        magnitudes = (
            [None] * len(rows) if update.magnitude_O is None else update.magnitude_O.split(list(rows))
        )
        blocks = update.b_OR.split(list(rows))
        for part, b_OR, magnitude in zip(fusion.parts, blocks, magnitudes, strict=True):
            used = b_OR.ne(0).any(dim=0)
            if not used.any() and magnitude is None and update.b_OR.any():
                continue
            a_RI = update.a_RI
            if not used.all() and used.any() and _is_block_diagonal(blocks):
                a_RI, b_OR = a_RI[used], b_OR[:, used]
            path = name.removesuffix(fusion.fused) + part
            updates[path] = Update(
                a_RI=a_RI.clone(), b_OR=b_OR.clone(), scaling=update.scaling, magnitude_O=magnitude
            )
    return weights.with_updates(updates)


def _is_block_diagonal(blocks: Sequence[torch.Tensor]) -> bool:
    """Whether no column of B serves two parts."""
    uses = torch.stack([block.ne(0).any(dim=0) for block in blocks])
    return bool((uses.sum(dim=0) <= 1).all())


def _stacked(path: str, found: Sequence[Update | None], sizes: Sequence[int], where: str) -> Update:
    present = [update for update in found if update is not None]
    if not sizes and len(present) == len(found):
        sizes = [update.out_features for update in present]
    rows = _checked_sizes(path, sizes, len(found), sum(sizes), where)
    for update, size in zip(found, rows, strict=True):
        if update is not None and (update.out_features, update.in_features) != (size, present[0].in_features):
            raise AdapterError(
                f"the parts of '{path}' do not fit each other",
                where=where,
                why=f"an update has {update.out_features} rows in place of {size}, or other inputs",
                do="convert it for the base it was trained on",
            )
    magnitudes = [update.magnitude_O for update in present if update.magnitude_O is not None]
    if magnitudes and len(magnitudes) < len(found):
        raise AdapterError(
            f"'{path}' cannot be fused: DoRA is on some of its parts only",
            where=where,
            why="the other parts' magnitudes are the row lengths of the base",
            do="merge the adapter into its base",
        )
    scaling = present[0].scaling
    scaled = [
        None
        if u is None
        else u
        if u.scaling == scaling
        else replace(u, b_OR=u.b_OR.float() * (u.scaling / scaling))
        for u in found
    ]
    shares_a = all(torch.equal(update.a_RI, present[0].a_RI) for update in present)
    a_RI = present[0].a_RI if shares_a else torch.cat([update.a_RI for update in present])
    kinds = [update.b_OR.dtype for update in scaled if update is not None]
    kind = torch.float32 if torch.float32 in kinds else kinds[0]
    b_OR = torch.zeros(sum(rows), a_RI.shape[0], dtype=kind)
    row = column = 0
    for part, size in zip(scaled, rows, strict=True):
        if part is not None:
            b_OR[row : row + size, column : column + part.rank] = part.b_OR
            column += 0 if shares_a else part.rank
        row += size
    magnitude = torch.cat(magnitudes) if magnitudes else None
    return Update(a_RI=a_RI, b_OR=b_OR, scaling=scaling, magnitude_O=magnitude)


def _checked_sizes(
    name: str, sizes: Sequence[int], num_parts: int, out_features: int, where: str
) -> Sequence[int]:
    if len(sizes) == num_parts and sum(sizes) == out_features and min(sizes) > 0:
        return sizes
    raise AdapterError(
        f"the sizes of the parts of '{name}' are not known",
        where=where,
        why=f"it has {out_features} outputs and {num_parts} parts; told were {list(sizes)}"
        if out_features
        else "some parts have no update",
        do="name the base with --base, so that its config tells them",
    )
