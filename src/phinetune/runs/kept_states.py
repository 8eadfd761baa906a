"""Decide whether the states below the first trained block are kept on disk, say so beforehand, make them.

Knows nothing of how they are computed or read.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phinetune.models.loading import Base
from phinetune.models.lower_states import first_trained_block, lower_states, states_bytes, states_path
from phinetune.runs.prepare import Prepared
from phinetune.text.render import Rendered
from phinetune.training.distributed import Ranks

FOLDER = Path("cache") / "states"
# Of the disk's room, all that is kept together.
LARGEST_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptStates:
    """States of all rows below `first_block`, kept in `folder` of the project: already, if `is_made`."""

    first_block: int
    size_bytes: int
    folder: str
    is_made: bool


def kept_states(
    project: Path, base: Base, prepared: Prepared, ranks: Ranks, *, is_required: bool = False
) -> KeptStates | None:
    """What is worth keeping: the lower blocks are frozen, rows come again, and the disk has room.

    A run that used them and goes on `is_required` to: computed in other batches they would round differently.
    """
    plan = prepared.plan
    if ranks.size > 1 or plan.num_steps <= plan.steps_per_epoch:
        return None
    first_block = first_trained_block(base)
    if not first_block:
        return None
    rows = _rows(prepared)
    path = states_path(base, first_block, rows, project / FOLDER)
    size_bytes = states_bytes(base, rows)
    is_made = path.is_dir()
    held = sum(file.stat().st_size for file in (project / FOLDER).rglob("*") if file.is_file())
    most = LARGEST_SHARE * (shutil.disk_usage(project).free + held)
    if not (is_made or is_required) and held + size_bytes > most:
        return None
    return KeptStates(first_block=first_block, size_bytes=size_bytes, folder=str(FOLDER), is_made=is_made)


def with_kept_states(project: Path, base: Base, prepared: Prepared, kept: KeptStates) -> Base:
    """The base with the states at hand. Raises `SpaceError` when the disk becomes full."""
    states = lower_states(base, kept.first_block, _rows(prepared), project / FOLDER)
    return dataclasses.replace(base, lower=states)


def _rows(prepared: Prepared) -> Sequence[Rendered]:
    """All that the run will read, in an order that does not hang on its seed."""
    train = sorted(prepared.plan.train_sequences.rows)
    test = sorted(prepared.plan.test_sequences.rows)
    return [
        *(prepared.train.rendered[row] for row in train),
        *(prepared.test.rendered[row] for row in test),
    ]
