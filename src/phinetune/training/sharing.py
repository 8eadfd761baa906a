"""What leading tokens the rows of a run share, for the plan: measured on the first update.

Knows nothing of models; what is shared is decided anew for each forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phinetune.models.shared_prefixes import shared_prefixes
from phinetune.text.render import Rendered
from phinetune.text.row_files import num_tokens_in
from phinetune.training.packing import Rows, batches
from phinetune.training.settings import TrainingSettings
from phinetune.training.step import pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """The most leading tokens that rows of the first update have in common, and how much of it that saves."""

    num_leading_tokens: int
    saved_share: float


def sharing_of(
    settings: TrainingSettings, sequences: Sequence[Rows], rows: Sequence[Rendered], is_cpu: bool
) -> Sharing | None:
    """What is shared in the first update of the first epoch's `sequences`; None where nothing is."""
    update = next(batches(sequences, settings.effective_batch_size))
    found = [
        prefix
        for piece in pieces(update, rows, settings.train_batch_size, is_cpu)
        for prefix in shared_prefixes([rows[row] for row in piece])
    ]
    if not found:
        return None
    num_tokens = sum(num_tokens_in(rows, sequence) for sequence in update)
    return Sharing(
        num_leading_tokens=max(prefix.num_tokens for prefix in found),
        saved_share=sum(prefix.num_saved for prefix in found) / num_tokens,
    )
