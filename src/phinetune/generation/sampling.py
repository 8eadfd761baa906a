"""Choose the next token from its logits. Knows nothing of models or of other rows.

The order is that of the field: penalties and bias, temperature, min-p and top-k, top-p, then one draw.
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

    >>> bool((Dice(7).roll(3) == Dice(7).roll(3)).all())
    True
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def roll(self, num_tokens: int) -> Tensor:
        """A waiting time with mean 1 for each token, (V,)."""
        return torch.empty(num_tokens, dtype=torch.float64).exponential_(generator=self._generator)


def choose(
    logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int], dice: Dice
) -> Choice:
    """The next token of a row whose ids so far are `prompt` and `answer`."""
    raw_V = logits_V.float()
    scores_V = _penalised(raw_V, sampling, prompt, answer)
    token = int(scores_V.argmax()) if sampling.temperature == 0 else _drawn(scores_V, sampling, dice)
    return (
        Choice(token=token) if sampling.num_logprobs is None else scored(raw_V, token, sampling.num_logprobs)
    )


def scored(logits_V: Tensor, token: int, num_logprobs: int) -> Choice:
    """A token with its log-probability and those of the likeliest ones."""
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    best = torch.topk(logprobs_V, num_logprobs)
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
    """The token whose waiting time, at the rate of its share, is the shortest: each wins by its share.

    Every token has a time of its own, so rounding in the logits, which differs with the rows beside, changes
    a choice only where two times are within rounding. Drawing along a sorted sum would slip at every border.
    """
    shares_V = torch.softmax(scores_V.double() / sampling.temperature, dim=-1)
    least = sampling.min_p * float(shares_V.max())
    if 0 < sampling.top_k < len(shares_V):
        least = max(least, float(torch.topk(shares_V, sampling.top_k).values[-1]))
    if sampling.top_p < 1:
        sorted_V = (shares_V * (shares_V >= least)).sort(descending=True).values
        before_V = sorted_V.cumsum(dim=-1) - sorted_V
        # A token stays when those before it do not yet hold top_p: the likeliest always does.
        num_kept = max(int((before_V < sampling.top_p * float(sorted_V.sum())).sum()), 1)
        least = max(least, float(sorted_V[num_kept - 1]))
    times_V = dice.roll(len(shares_V)).to(shares_V.device) / shares_V
    return int(times_V.masked_fill(shares_V < least, torch.inf).argmin())
