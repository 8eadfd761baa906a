"""Loss and accuracy per example, on many examples in few passes.

Knows nothing of adapters: scores whatever the model is at the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from phinetune.generation.mode import without_dropout
from phinetune.models.batch import PackedBatch
from phinetune.models.loading import Base
from phinetune.models.loss import token_scores
from phinetune.text.render import Rendered

# Enough to fill the matrix products; more only takes memory.
BATCH_TOKENS_CPU = 2048
BATCH_TOKENS_GPU = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleScores:
    """One entry per example: summed negative log-likelihood, trained tokens, those guessed right."""

    nll_N: NDArray[np.float64]
    num_trained_N: NDArray[np.float64]
    num_correct_N: NDArray[np.float64]


def score_examples(
    base: Base, examples: Sequence[Rendered], *, on_progress: Callable[[int], None] | None = None
) -> ExampleScores:
    """Score each example by itself; `on_progress(done)` counts examples. Every example must fit the model."""
    sums_N3 = np.zeros((len(examples), 3))
    with without_dropout(base):
        for batch in token_batches(examples, batch_limit(base)):
            sums_N3[batch.start : batch.stop] = _batch_sums(base, [examples[index] for index in batch])
            if on_progress:
                on_progress(batch.stop)
    return ExampleScores(nll_N=sums_N3[:, 0], num_trained_N=sums_N3[:, 1], num_correct_N=sums_N3[:, 2])


def _batch_sums(base: Base, examples: Sequence[Rendered]) -> NDArray[np.float64]:
    """Per example the sums of loss, of ones, of correct guesses: [examples, 3]."""
    scores = token_scores(base, PackedBatch.lay(examples, base.device))
    nll_N = scores.nll_N.double()
    columns_N3 = torch.stack([nll_N, torch.ones_like(nll_N), scores.is_correct_N.double()], dim=1)
    sums_S3 = torch.zeros(len(examples), 3, dtype=torch.float64, device=nll_N.device)
    sums: NDArray[np.float64] = sums_S3.index_add_(0, scores.segment_N, columns_N3).cpu().numpy()
    return sums


def batch_limit(base: Base) -> int:
    """The tokens of one forward pass."""
    return BATCH_TOKENS_GPU if base.device.type == "cuda" else BATCH_TOKENS_CPU


def token_batches(examples: Sequence[Rendered], limit: int) -> Iterator[range]:
    """Runs of neighbours of at most `limit` tokens; a longer example stands alone."""
    start, num_tokens = 0, 0
    for index, example in enumerate(examples):
        if index > start and num_tokens + example.num_tokens > limit:
            yield range(start, index)
            start, num_tokens = index, 0
        num_tokens += example.num_tokens
    if start < len(examples):
        yield range(start, len(examples))
