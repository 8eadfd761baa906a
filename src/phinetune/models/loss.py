"""Cross-entropy on the trained tokens only; full logits never exist.

The hidden states that must predict a trained token are gathered and go through the output head a
chunk at a time; the gradient of the hidden states is formed in the same pass, so a chunk's logits are
dropped at once. Knows nothing of batches' origin or of optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.models.batch import NOT_TRAINED, PackedBatch
from phinetune.models.classifier import class_logits, class_loss
from phinetune.models.loading import Base

# Logits of one chunk: 4 M entries is 16 MB in float32. Larger chunks were not faster.
CHUNK_ENTRIES = 1 << 22


def trained_token_loss(base: Base, batch: PackedBatch, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """The summed cross-entropy of the trained tokens (a scalar with gradient), and their number.

    `label_smoothing` is the share of each target spread evenly over the vocabulary, as in torch's
    `cross_entropy`. The caller divides by the trained tokens of a whole step, so that accumulation is exact.
    With a classification head it is the loss of each segment's class, told by its last token.
    """
    if base.classifier is not None:
        return class_loss(base, batch, label_smoothing)
    hidden_TH = base.hidden_states(batch)
    chosen = (batch.targets_T != NOT_TRAINED).nonzero().squeeze(1)
    hidden_NH, targets_N = hidden_TH[chosen], batch.targets_T[chosen]
    loss: Tensor = _SummedLoss.apply(hidden_NH, targets_N, base, label_smoothing)
    return loss, len(chosen)


class _SummedLoss(torch.autograd.Function):
    """Σ −log softmax(head(h)) · smoothed target; the head is frozen, so only h has a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, targets_N: Tensor, base: Base, label_smoothing: float) -> Tensor:
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        gradient_NH = torch.empty_like(hidden_NH)
        weight_VH = base.head.weight
        assert isinstance(weight_VH, Tensor)
        for span in _spans(len(targets_N), base.vocab_size):
            hidden, targets = hidden_NH[span], targets_N[span]
            logits = base.head_logits(hidden).float()
            squash = 1 - (logits / base.logit_softcap) ** 2 if base.logit_softcap else None
            log_p = torch.log_softmax(logits, dim=-1)
            total -= (1 - label_smoothing) * log_p.gather(1, targets[:, None]).sum()
            if label_smoothing:
                total -= label_smoothing * log_p.mean(-1).sum()
            d_logits = log_p.exp_()
            d_logits[torch.arange(len(targets), device=targets.device), targets] -= 1 - label_smoothing
            if label_smoothing:
                d_logits -= label_smoothing / logits.shape[-1]
            if squash is not None:
                d_logits *= squash
            torch.matmul(d_logits.to(hidden.dtype), weight_VH, out=gradient_NH[span])
        ctx.save_for_backward(gradient_NH)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * d_total.to(gradient_NH.dtype), None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """One entry per trained token, in order; `segment_N` says which segment it belongs to."""

    nll_N: Tensor
    is_correct_N: Tensor
    segment_N: Tensor


@torch.no_grad()
def token_scores(base: Base, batch: PackedBatch) -> TokenScores:
    """Negative log-likelihood (float32) and greedy correctness of each trained token, or of each class."""
    if base.classifier is not None:
        return _class_scores(base, batch)
    hidden_TH = base.hidden_states(batch)
    chosen = (batch.targets_T != NOT_TRAINED).nonzero().squeeze(1)
    hidden_NH, targets_N = hidden_TH[chosen], batch.targets_T[chosen]
    nll_N = torch.empty(len(chosen), dtype=torch.float32, device=hidden_TH.device)
    is_correct_N = torch.empty(len(chosen), dtype=torch.bool, device=hidden_TH.device)
    for span in _spans(len(chosen), base.vocab_size):
        logits = base.head_logits(hidden_NH[span]).float()
        targets = targets_N[span]
        nll_N[span] = logits.logsumexp(-1) - logits.gather(1, targets[:, None]).squeeze(1)
        is_correct_N[span] = logits.argmax(-1) == targets
    lengths = torch.tensor(batch.segment_lengths, device=hidden_TH.device)
    segments_T = torch.repeat_interleave(torch.arange(len(lengths), device=hidden_TH.device), lengths)
    return TokenScores(nll_N=nll_N, is_correct_N=is_correct_N, segment_N=segments_T[chosen])


def _class_scores(base: Base, batch: PackedBatch) -> TokenScores:
    assert batch.classes_S is not None
    logits_SC = class_logits(base, batch)
    return TokenScores(
        nll_N=torch.nn.functional.cross_entropy(logits_SC, batch.classes_S, reduction="none"),
        is_correct_N=logits_SC.argmax(-1) == batch.classes_S,
        segment_N=torch.arange(len(logits_SC), device=logits_SC.device),
    )


def _spans(num_rows: int, vocab_size: int) -> list[slice]:
    size = max(1, CHUNK_ENTRIES // vocab_size)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
