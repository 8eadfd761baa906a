"""What comparing base and adapter will cost: seconds, by timing a few tokens, and bytes, by counting.

Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phinetune.data.conversation import Example
from phinetune.evaluation.prompts import Prompt, answer_prompts, default_max_new_tokens
from phinetune.evaluation.scores import BATCH_TOKENS_CPU, BATCH_TOKENS_GPU
from phinetune.generation.greedy import AnswerBatch, answer_batches, generate_batch
from phinetune.lora.attach import Adapter
from phinetune.models.loading import Base
from phinetune.models.memory import Costs, StepShape
from phinetune.models.timing import timed
from phinetune.text.render import Rendered, Renderer

# The probe answers about as many prompts as can be read in this time, in this many tokens.
READ_S = 1.0
NUM_PROBE_TOKENS = 4
# The cache is copied as it grows, and what it leaves behind rarely fits what comes next.
CACHE_COPIES = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """The answers a comparison will ask for: batches, the longest reference of each, the limit."""

    batches: tuple[AnswerBatch, ...]
    reference_lengths: tuple[int, ...]
    max_new_tokens: int


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
    """The prompts `compare` will answer, and in which batches."""
    prompts, _ = answer_prompts(
        base, renderer, examples, system_prompt=system_prompt, max_answered=max_answered, seed=seed
    )
    if max_new_tokens is None:
        max_new_tokens = default_max_new_tokens(renderer, prompts) if prompts else 0
    batches = answer_batches(base, [prompt.ids for prompt in prompts], max_new_tokens)
    lengths = [len(renderer.tokenizer.encode_plain(prompt.reference)) + 1 for prompt in prompts]
    return prompts, Answering(
        batches=tuple(batches),
        reference_lengths=tuple(max(lengths[row] for row in batch.rows) for batch in batches),
        max_new_tokens=max_new_tokens,
    )


def comparison_seconds(
    answering: Answering, num_scored_tokens: int, test_s: float, steps: tuple[StepSeconds, StepSeconds]
) -> float:
    """Scoring and answering by base and adapter. `test_s` is the time to read a token; `steps` are of base
    and adapter. Some row of a base goes on to the limit; an adapter ends about where the reference ends."""
    seconds = 2 * num_scored_tokens * test_s
    for batch, reference_length in zip(answering.batches, answering.reference_lengths, strict=True):
        reading = len(batch.rows) * batch.longest_prompt * test_s
        numbers = answering.max_new_tokens, min(answering.max_new_tokens, reference_length)
        for step, num_tokens in zip(steps, numbers, strict=True):
            seconds += reading + max(0, num_tokens - 1) * step.of(len(batch.rows))
    return seconds


def comparison_bytes(costs: Costs, answering: Answering, rows: Sequence[Rendered]) -> float:
    """The most held while scoring, or while a batch of prompts is read or answered."""
    batch_tokens = BATCH_TOKENS_CPU if costs.is_cpu else BATCH_TOKENS_GPU
    scored = StepShape(
        num_tokens=min(batch_tokens, sum(row.num_tokens for row in rows)),
        num_trained_tokens=min(batch_tokens, sum(row.num_trained for row in rows)),
        longest_segment=max(row.num_tokens for row in rows),
    )
    answered = [
        batch.cache_bytes * CACHE_COPIES + costs.forward(len(batch.rows) * batch.longest_prompt)
        for batch in answering.batches
    ]
    return max([costs.evaluation(scored), *answered])


def step_seconds(
    base: Base, adapter: Adapter, prompts: Sequence[Prompt], test_s: float
) -> tuple[StepSeconds, StepSeconds]:
    """Time a token for a batch of prompts and for one, by base and adapter."""
    ids = sorted((prompt.ids for prompt in prompts), key=len)
    middle = ids[len(ids) // 2]
    most = int(READ_S / (len(middle) * test_s))
    num_rows = max(1, min(most, len(ids), 64))
    with adapter.disabled():
        of_base = _step_seconds(base, middle, num_rows)
    return of_base, _step_seconds(base, middle, num_rows)


def _step_seconds(base: Base, prompt: Sequence[int], num_rows: int) -> StepSeconds:
    one = _timed_step(base, [prompt])
    if num_rows == 1:
        return StepSeconds(first_row=one, further_row=one / 8)
    many = _timed_step(base, [prompt] * num_rows)
    return StepSeconds(first_row=one, further_row=max(0.0, many - one) / (num_rows - 1))


def _timed_step(base: Base, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds of a token after the first, from answers of two lengths."""

    def answer(num_tokens: int) -> float:
        return timed(
            lambda: generate_batch(base, prompts, max_new_tokens=num_tokens, stop_ids=()), base.device
        )

    return max(1e-6, answer(1 + NUM_PROBE_TOKENS) - answer(1)) / NUM_PROBE_TOKENS


def nothing_answered() -> tuple[StepSeconds, StepSeconds]:
    """For a comparison of losses alone."""
    none = StepSeconds(first_row=0.0, further_row=0.0)
    return none, none
