"""What comparing base and adapter will cost: seconds, by timing a few tokens, and bytes, by counting.

Knows nothing of training.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phinetune.data.conversation import Example
from phinetune.evaluation.prompts import Prompt, answer_prompts, default_max_new_tokens
from phinetune.evaluation.scores import BATCH_TOKENS_CPU, BATCH_TOKENS_GPU
from phinetune.generation.greedy import AnswerRoom, answer_room, generate_batch
from phinetune.lora.attach import Adapter
from phinetune.models.loading import Base
from phinetune.models.memory import Costs, StepShape
from phinetune.models.timing import timed
from phinetune.text.render import Rendered, Renderer

# The probe answers about as many prompts as can be read in this time, in this many tokens.
READ_S = 1.0
NUM_PROBE_TOKENS = 4
# The cache is copied as it grows, a layer at a time, and what it leaves behind rarely fits what comes next.
CACHE_COPIES = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """The answers a comparison will ask for, in tokens, longest prompt first; and what they take."""

    prompt_lengths: tuple[int, ...]
    reference_lengths: tuple[int, ...]
    max_new_tokens: int
    room: AnswerRoom | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Seconds of one token for a whole batch: with one row, and what every further row adds."""

    first_row: float
    further_row: float

    def of(self, num_rows: int) -> float:
        return self.first_row + (num_rows - 1) * self.further_row


def planned_answers(
    base: Base,
    renderer: Renderer,
    examples: Sequence[Example],
    *,
    max_answered: int,
    max_new_tokens: int | None,
    seed: int,
    system_prompt: str | None,
) -> tuple[list[Prompt], Answering]:
    """The prompts `compare` will answer, and how long they and their answers are."""
    prompts, _ = answer_prompts(
        base, renderer, examples, system_prompt=system_prompt, max_answered=max_answered, seed=seed
    )
    if max_new_tokens is None:
        max_new_tokens = default_max_new_tokens(renderer, prompts) if prompts else 0
    return prompts, answering_of(
        base,
        [(len(prompt.ids), len(renderer.tokenizer.encode_plain(prompt.reference)) + 1) for prompt in prompts],
        max_new_tokens,
    )


def answering_of(base: Base, lengths: Sequence[tuple[int, int]], max_new_tokens: int) -> Answering:
    """Answers to prompts of these lengths, each with that of its reference."""
    found = sorted(lengths, reverse=True)
    prompt_lengths = tuple(prompt for prompt, _ in found)
    return Answering(
        prompt_lengths=prompt_lengths,
        reference_lengths=tuple(min(reference, max_new_tokens) for _, reference in found),
        max_new_tokens=max_new_tokens,
        room=answer_room(base, prompt_lengths, max_new_tokens) if found else None,
    )


def comparison_seconds(
    answering: Answering, num_scored_tokens: int, test_s: float, steps: tuple[StepSeconds, StepSeconds]
) -> float:
    """Scoring and answering by base and adapter. `test_s` is the time to read a token; `steps` are of base
    and adapter. An adapter's answers end about where the references end; how a base ends nobody knows: they
    are taken as half-way to the limit."""
    seconds = 2 * (num_scored_tokens + sum(answering.prompt_lengths)) * test_s
    of_adapter = answering.reference_lengths
    of_base = [(answering.max_new_tokens + length) // 2 for length in of_adapter]
    if answering.room:
        for step, lengths in zip(steps, (of_base, of_adapter), strict=True):
            seconds += _answering_seconds(step, lengths, answering.room.num_rows)
    return seconds


def _answering_seconds(step: StepSeconds, num_tokens: Sequence[int], most_rows: int) -> float:
    """Answers of so many tokens, `most_rows` at a time: where one ends the next begins."""
    waiting = list(reversed(num_tokens))
    ends: list[int] = []  # the steps at which the rows that are alive end
    now, seconds = 0, 0.0
    while waiting or ends:
        while waiting and len(ends) < most_rows:
            heapq.heappush(ends, now + waiting.pop())
        num_rows, end = len(ends), heapq.heappop(ends)
        seconds += (end - now) * step.of(num_rows)
        now = end
    return seconds


def comparison_bytes(costs: Costs, answering: Answering, rows: Sequence[Rendered]) -> float:
    """The most held while scoring, or while prompts are read and answered."""
    batch_tokens = BATCH_TOKENS_CPU if costs.is_cpu else BATCH_TOKENS_GPU
    scored = StepShape(
        num_tokens=min(batch_tokens, sum(row.num_tokens for row in rows)),
        num_trained_tokens=min(batch_tokens, sum(row.num_trained for row in rows)),
        longest_segment=max(row.num_tokens for row in rows),
    )
    room = answering.room
    answered = room.cache_bytes * CACHE_COPIES + costs.forward(room.tokens_per_step) if room else 0.0
    return max(costs.evaluation(scored), answered)


def step_seconds(
    base: Base,
    adapter: Adapter,
    prompts: Sequence[Prompt],
    test_s: float,
    agreed: Callable[[bool], bool] = bool,
) -> tuple[StepSeconds, StepSeconds]:
    """Time a token for a batch of prompts and for one, by base and adapter; for `agreed` see `timed`."""
    ids = sorted((prompt.ids for prompt in prompts), key=len)
    middle = ids[len(ids) // 2]
    most = int(READ_S / (len(middle) * test_s))
    num_rows = max(1, min(most, len(ids), 64))
    with adapter.disabled():
        of_base = _step_seconds(base, middle, num_rows, agreed)
    return of_base, _step_seconds(base, middle, num_rows, agreed)


def _step_seconds(
    base: Base, prompt: Sequence[int], num_rows: int, agreed: Callable[[bool], bool]
) -> StepSeconds:
    one = _timed_step(base, [prompt], agreed)
    if num_rows == 1:
        return StepSeconds(first_row=one, further_row=one / 8)
    many = _timed_step(base, [prompt] * num_rows, agreed)
    return StepSeconds(first_row=one, further_row=max(0.0, many - one) / (num_rows - 1))


def _timed_step(base: Base, prompts: Sequence[Sequence[int]], agreed: Callable[[bool], bool]) -> float:
    """Seconds of a token after the first, from answers of two lengths."""

    def answer(num_tokens: int) -> float:
        return timed(
            lambda: generate_batch(base, prompts, max_new_tokens=num_tokens, stop_ids=()),
            base.device,
            agreed,
        )

    return max(1e-6, answer(1 + NUM_PROBE_TOKENS) - answer(1)) / NUM_PROBE_TOKENS


def nothing_answered() -> tuple[StepSeconds, StepSeconds]:
    """For a comparison of losses alone."""
    none = StepSeconds(first_row=0.0, further_row=0.0)
    return none, none
