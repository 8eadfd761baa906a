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

from phinetune.kernels.calls import kernels_for
from phinetune.kernels.products import product_of
from phinetune.lora.whole import HeadRows
from phinetune.models.batch import NOT_TRAINED, PackedBatch
from phinetune.models.classifier import class_logits, class_loss
from phinetune.models.loading import Base

# Logits of one chunk: 4 M entries is 16 MB in float32.
CHUNK_ENTRIES = 1 << 22
# On a CPU the head's weights are laid out anew for each chunk: 16 M take 0.8 of the time of 4 M.
CPU_CHUNK_ENTRIES = 1 << 24
# But so many rows at least on a CPU: of 152,000 words a row takes 0.65 ms among 128 rows, 1.4 ms among 27.
LEAST_CPU_ROWS = 128
# Logits worked on at once in float32 on a CPU: what its cache holds.
BLOCK_ENTRIES = 1 << 18
# Rows of a chunk are filled up to a multiple: on a CPU the first product of a new shape takes up to 40 ms.
ROWS_MULTIPLE = 32


def trained_token_loss(base: Base, batch: PackedBatch, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """The summed cross-entropy of the trained tokens (a scalar with gradient), and their number.

    `label_smoothing` is the share of each target spread evenly over the vocabulary, as in torch's
    `cross_entropy`. The caller divides by the trained tokens of a whole step, so that accumulation is exact.
    With a classification head it is the loss of each segment's class, told by its last token.
    """
    if base.classifier is not None:
        return class_loss(base, batch, label_smoothing)
    chosen = (batch.targets_T != NOT_TRAINED).nonzero().squeeze(1)
    hidden_FH, targets_N = base.hidden_states(batch, _filled(chosen)), batch.targets_T[chosen]
    loss: Tensor = _SummedLoss.apply(hidden_FH, targets_N, base, label_smoothing, *_trained_head(base))
    return loss, len(chosen)


def _filled(chosen_N: Tensor) -> Tensor:
    """Places filled up to a multiple, F of them, with the first again; whoever reads on ends after N."""
    return torch.cat([chosen_N, chosen_N[:1].expand(-len(chosen_N) % ROWS_MULTIPLE)])


def _trained_head(base: Base) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What of the output head is trained: its weight or some rows of it, which rows, its bias."""
    head = base.head
    if isinstance(head, HeadRows):
        return (head.rows.weight if head.rows.is_enabled else None), head.rows.ids_K, None
    weight, bias = head.weight, getattr(head, "bias", None)
    assert isinstance(weight, Tensor)
    return (
        weight if weight.requires_grad else None,
        None,
        bias if bias is not None and bias.requires_grad else None,
    )


class _SummedLoss(torch.autograd.Function):
    """Σ −log softmax(head(h)) · smoothed target, with the gradient of h and of what of the head is trained.

    `rows_KH` are the head's trained rows `ids_K`, or its whole weight where `ids_K` is None; mostly nothing.
    The first N of `hidden_FH` have targets.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_FH: Tensor,
        targets_N: Tensor,
        base: Base,
        label_smoothing: float,
        rows_KH: Tensor | None,
        ids_K: Tensor | None,
        bias_V: Tensor | None,
    ) -> Tensor:
        total = hidden_FH.new_zeros((), dtype=torch.float32)
        gradient_FH = torch.empty_like(hidden_FH)
        head_gradients = _HeadGradients(rows_KH, ids_K, bias_V)
        weight_VH = base.head.weight
        assert isinstance(weight_VH, Tensor)
        for span in _spans(hidden_FH, base.vocab_size):
            hidden, targets = hidden_FH[span], targets_N[span]
            logits = base.head_logits(hidden)
            with_target, filling = logits[: len(targets)], logits[len(targets) :]
            total += _loss_and_slope(with_target, targets, label_smoothing, base.logit_softcap)
            filling.zero_()
            d_logits = logits
            head_gradients.add(d_logits, hidden)
            own_NH = head_gradients.through_rows(d_logits)
            product_of(d_logits, weight_VH, out=gradient_FH[span])
            if own_NH is not None:
                gradient_FH[span] += own_NH
        ctx.save_for_backward(gradient_FH)
        ctx.head_gradients = head_gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_FH,) = ctx.saved_tensors
        rows_KH, bias_V = ctx.head_gradients.rows_KH, ctx.head_gradients.bias_V
        return (
            gradient_FH * d_total.to(gradient_FH.dtype),
            None,
            None,
            None,
            None if rows_KH is None else rows_KH * d_total,
            None,
            None if bias_V is None else bias_V * d_total,
        )


def _loss_and_slope(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, softcap: float | None
) -> Tensor:
    """The summed loss of some rows; the gradient of the logits takes their place."""
    if kernels := kernels_for(logits_NV):
        losses_N = kernels.cross_entropy_(logits_NV, targets_N, label_smoothing, softcap or 0.0)
        return losses_N.sum()
    total = torch.zeros((), device=logits_NV.device)
    for rows in _blocks(logits_NV):
        total += _block_loss_and_slope(logits_NV[rows], targets_N[rows], label_smoothing, softcap)
    return total


def _block_loss_and_slope(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, softcap: float | None
) -> Tensor:
    logits = logits_NV.float()
    log_p = torch.log_softmax(logits, dim=-1)
    total = (label_smoothing - 1) * log_p.gather(1, targets_N[:, None]).sum()
    if label_smoothing:
        total -= label_smoothing * log_p.mean(-1).sum()
    d_logits = log_p.exp_()
    d_logits[torch.arange(len(targets_N), device=targets_N.device), targets_N] -= 1 - label_smoothing
    if label_smoothing:
        d_logits -= label_smoothing / logits.shape[-1]
    if softcap:
        d_logits *= 1 - (logits / softcap) ** 2
    logits_NV.copy_(d_logits)
    return total


class _HeadGradients:
    """The gradients of what of the head is trained, summed over the chunks in float32."""

    def __init__(self, rows_KH: Tensor | None, ids_K: Tensor | None, bias_V: Tensor | None) -> None:
        self._own_KH, self._ids_K = rows_KH, ids_K
        self.rows_KH = None if rows_KH is None else torch.zeros_like(rows_KH, dtype=torch.float32)
        self.bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)

    def add(self, d_logits_NV: Tensor, hidden_NH: Tensor) -> None:
        if self.bias_V is not None:
            self.bias_V += d_logits_NV.sum(0, dtype=torch.float32)
        if self.rows_KH is not None:
            own_NK = d_logits_NV if self._ids_K is None else d_logits_NV[:, self._ids_K]
            self.rows_KH += (own_NK.t() @ hidden_NH).float()

    def through_rows(self, d_logits_NV: Tensor) -> Tensor | None:
        """The gradient of h through the trained rows, (N, H); takes it out of `d_logits_NV`."""
        if self._own_KH is None or self._ids_K is None:
            return None
        own_NK = d_logits_NV[:, self._ids_K]
        d_logits_NV[:, self._ids_K] = 0
        return own_NK @ self._own_KH.to(own_NK.dtype)


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
    chosen = (batch.targets_T != NOT_TRAINED).nonzero().squeeze(1)
    hidden_FH, targets_N = base.hidden_states(batch, _filled(chosen)), batch.targets_T[chosen]
    nll_N = torch.empty(len(chosen), dtype=torch.float32, device=hidden_FH.device)
    is_correct_N = torch.empty(len(chosen), dtype=torch.bool, device=hidden_FH.device)
    for span in _spans(hidden_FH, base.vocab_size):
        targets = targets_N[span]
        chunk = base.head_logits(hidden_FH[span])[: len(targets)]
        for rows in _blocks(chunk):
            logits, target = chunk[rows].float(), targets[rows, None]
            nll_N[span][rows] = (logits.logsumexp(-1, keepdim=True) - logits.gather(1, target)).squeeze(1)
            is_correct_N[span][rows] = logits.argmax(-1) == target.squeeze(1)
    lengths = torch.tensor(batch.segment_lengths, device=hidden_FH.device)
    segments_T = torch.repeat_interleave(torch.arange(len(lengths), device=hidden_FH.device), lengths)
    return TokenScores(nll_N=nll_N, is_correct_N=is_correct_N, segment_N=segments_T[chosen])


def _class_scores(base: Base, batch: PackedBatch) -> TokenScores:
    assert batch.classes_S is not None
    logits_SC = class_logits(base, batch)
    return TokenScores(
        nll_N=torch.nn.functional.cross_entropy(logits_SC, batch.classes_S, reduction="none"),
        is_correct_N=logits_SC.argmax(-1) == batch.classes_S,
        segment_N=torch.arange(len(logits_SC), device=logits_SC.device),
    )


def _spans(hidden_FH: Tensor, vocab_size: int) -> list[slice]:
    num_rows, size = len(hidden_FH), chunk_rows(vocab_size, is_cpu=hidden_FH.device.type == "cpu")
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def chunk_rows(vocab_size: int, *, is_cpu: bool) -> int:
    """The rows whose logits exist at once."""
    entries, least = (CPU_CHUNK_ENTRIES, LEAST_CPU_ROWS) if is_cpu else (CHUNK_ENTRIES, 1)
    size = max(entries // vocab_size, least)
    return size - size % ROWS_MULTIPLE if size > ROWS_MULTIPLE else size


def _blocks(logits_NV: Tensor) -> list[slice]:
    num_rows, size = logits_NV.shape
    step = max(1, BLOCK_ENTRIES // size) if logits_NV.device.type == "cpu" else max(1, num_rows)
    return [slice(start, start + step) for start in range(0, num_rows, step)]
