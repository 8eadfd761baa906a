"""Loss and token accuracy over the packed test set, without keeping logits.

Knows nothing of training state; calls nothing that learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from phinetune.models.batch import PackedBatch
from phinetune.models.loading import Base
from phinetune.models.loss import token_scores
from phinetune.text.render import Rendered
from phinetune.training.distributed import ALONE, Ranks
from phinetune.training.packing import Rows
from phinetune.training.settings import TrainingSettings
from phinetune.training.step import pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Means over all trained tokens of the test set."""

    loss: float
    token_accuracy: float
    num_trained_tokens: int


def validate(
    base: Base,
    rows: Sequence[Rendered],
    sequences: Sequence[Rows],
    settings: TrainingSettings,
    ranks: Ranks = ALONE,
) -> Validation:
    """Evaluate the model as it stands, without dropout; each of `ranks` a share of the sequences.

    Results stay on the device for `eval_accumulation_steps` batches (null: all) before they move.
    """
    was_training = base.model.training
    base.model.eval()
    every = settings.eval_accumulation_steps or len(sequences) or 1
    waiting: list[torch.Tensor] = []
    totals = torch.zeros(3, dtype=torch.float64)
    is_cpu = base.device.type == "cpu"
    parts = list(pieces(ranks.share(sequences, rows), rows, settings.test_batch_size, is_cpu))
    for piece, weight in ranks.passes(parts, filler=[sequences[0][0]]):
        scores = token_scores(base, PackedBatch.lay([rows[row] for row in piece], base.device))
        count = torch.tensor(float(len(scores.nll_N)), device=base.device)
        sums = torch.stack([scores.nll_N.sum(), scores.is_correct_N.sum().float(), count])
        waiting.append(weight * sums)
        if len(waiting) == every:
            totals += torch.stack(waiting).sum(0).to("cpu", torch.float64)
            waiting = []
    if waiting:
        totals += torch.stack(waiting).sum(0).to("cpu", torch.float64)
    base.model.train(was_training)
    loss, correct, number = ranks.add(totals).tolist()
    return Validation(loss=loss / number, token_accuracy=correct / number, num_trained_tokens=int(number))
