"""Choose the next token from its logits. Knows nothing of models or of other rows.

The order is that of the field: penalties and bias, temperature, top-k, top-p, min-p, then one draw.
The draw belongs to the request's own seed, so a text does not depend on the rows beside it.

# V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from phinetune.base.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the defaults take the likeliest one.

    `repetition_penalty` divides (or multiplies, below zero) the logits of every id of prompt and answer
    (arXiv 1909.05858); `presence_penalty` and `frequency_penalty` are subtracted for ids of the answer.
    `num_logprobs` asks for the log-probability of each chosen token, and of that many likeliest ones.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 1 << 31),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("num_logprobs", 0, 20),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(
                    f"{name} is {value:g}", where=name, do=f"write a number from {low:g} to {high:g}"
                )

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the likeliest token is taken as it stands, so that many rows can be chosen at once."""
        return self.temperature == 0 and not self._changes_logits and self.num_logprobs is None

    @property
    def _changes_logits(self) -> bool:
        return bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
        )


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A chosen token; the log-probabilities are the model's own, before penalties and temperature."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Dice:
    """The draws of one request: a pure function of its seed and of how many came before.

    >>> Dice(7).roll() == Dice(7).roll()
    True
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def roll(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(
    logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int], dice: Dice
) -> Choice:
    """The next token of a row whose ids so far are `prompt` and `answer`."""
    raw_V = logits_V.float()
    scores_V = _penalised(raw_V, sampling, prompt, answer)
    token = int(scores_V.argmax()) if sampling.temperature == 0 else _drawn(scores_V, sampling, dice)
    if sampling.num_logprobs is None:
        return Choice(token=token)
    logprobs_V = torch.log_softmax(raw_V, dim=-1)
    best = torch.topk(logprobs_V, sampling.num_logprobs)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Choice(token=token, logprob=float(logprobs_V[token]), top=tuple(pairs))


def _penalised(raw_V: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    scores_V = raw_V.clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *answer}), device=raw_V.device)
        values = scores_V[seen]
        factor = sampling.repetition_penalty
        scores_V[seen] = torch.where(values > 0, values / factor, values * factor)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.tensor(answer, device=raw_V.device).unique(return_counts=True)
        scores_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token, bias in sampling.logit_bias.items():
        scores_V[token] += bias
    return scores_V


def _drawn(scores_V: Tensor, sampling: Sampling, dice: Dice) -> int:
    """By inverse distribution over the tokens from the likeliest down."""
    size = min(sampling.top_k or len(scores_V), len(scores_V))
    if size < len(scores_V):
        top = torch.topk(scores_V, size)
        values_K, ids_K = top.values, top.indices
    else:
        values_K, ids_K = scores_V.sort(descending=True, stable=True)
    shares_K = torch.softmax(values_K.double() / sampling.temperature, dim=-1)
    upto_K = shares_K.cumsum(dim=-1)
    # A token stays when those before it do not yet hold top_p: the likeliest always does.
    stays_K = (upto_K - shares_K < sampling.top_p) & (shares_K >= sampling.min_p * shares_K[0])
    stays_K[0] = True
    upto_K = (shares_K * stays_K).cumsum(dim=-1)
    place = int(torch.searchsorted(upto_K, dice.roll() * float(upto_K[-1]), right=True))
    return int(ids_K[min(place, int(stays_K.nonzero()[-1]))])
