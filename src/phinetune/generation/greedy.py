"""Greedy answers to prompts, by the engine: many at a time for evaluation, or one as a stream.

Ids in, ids out: knows nothing of text or templates. The model answers as it stands, with its attached
adapter or without.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from phinetune.base.errors import UserError
from phinetune.generation.cache import LENGTH_MULTIPLE
from phinetune.generation.engine import Engine
from phinetune.generation.request import Request
from phinetune.generation.scheduler import Limits

if TYPE_CHECKING:
    from phinetune.generation.constraints import Grammar
    from phinetune.models.loading import Base

# More rows than this no longer pay on 2 CPU cores; a GPU step costs the same up to a few hundred rows.
MAX_ROWS_CPU = 64
MAX_ROWS_GPU = 256
CACHE_BYTES_CPU = 1 << 30


def generate_batch(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    grammar: Grammar | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The greedy answer to each prompt, in the order given, without the stop token.

    With a `grammar` every answer has its form: each token is the likeliest that fits. An answer ends at a
    stop token, after `max_new_tokens`, or where the model's context is full.
    `on_progress(done, total)` counts prompts.

    Raises `UserError` when a prompt is empty or leaves no room in the model's context.
    """
    rows = {}
    with Engine(base, _limits(base, len(prompts))) as engine:
        # Longest first: memory is asked for at its largest at once, not after an hour.
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            request = _request(prompts[index], max_new_tokens, stop_ids, grammar)
            try:
                rows[index] = engine.submit(request)
            except UserError as error:
                where = f"prompt {index + 1} of {len(prompts)}"
                raise UserError(error.what, where=where, why=error.why, do=error.do) from None
        num_done = 0
        while not engine.is_idle:
            num_ended = sum(row.is_over for row in engine.step())
            num_done += num_ended
            if on_progress and num_ended:
                on_progress(num_done, len(prompts))
    return [rows[index].tokens for index in range(len(prompts))]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRoom:
    """What `generate_batch` takes: rows alive at once, tokens read at once, bytes of its full caches."""

    num_rows: int
    tokens_per_step: int
    cache_bytes: int


def answer_room(base: Base, prompt_lengths: Sequence[int], max_new_tokens: int) -> AnswerRoom:
    """What `generate_batch` would take for prompts of these lengths, at most."""
    limits, per_token = _limits(base, len(prompt_lengths)), _cache_bytes_per_token(base)
    longest = min(max(prompt_lengths) + max_new_tokens, base.max_length)
    capacity = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    num_rows = max(1, min(limits.max_rows, len(prompt_lengths), limits.cache_tokens // longest))
    num_slots = 0
    while num_slots < num_rows:  # the engine doubles them as rows come
        num_slots = min(2 * (num_slots + 1), limits.max_rows)
    prefixes = min(limits.prefix_cache_bytes, sum(prompt_lengths) * per_token)
    return AnswerRoom(
        num_rows=num_rows,
        tokens_per_step=min(limits.tokens_per_step, sum(prompt_lengths)),
        cache_bytes=num_slots * capacity * per_token + prefixes,
    )


def stream(
    base: Base, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """The tokens of one greedy answer as they come; close the iterator to stop early.

    Between two tokens the model is as it was before the call. Raises `UserError` at once when the prompt is
    empty or leaves no room in the model's context.
    """
    engine = Engine(base, _limits(base, 1))
    return engine.follow(engine.submit(_request(prompt, max_new_tokens, stop_ids)))


def _request(
    prompt: Sequence[int], max_new_tokens: int, stop_ids: Collection[int], grammar: Grammar | None = None
) -> Request:
    return Request(
        prompt=tuple(prompt), max_new_tokens=max_new_tokens, stop_ids=frozenset(stop_ids), grammar=grammar
    )


def _limits(base: Base, num_prompts: int) -> Limits:
    is_gpu = base.device.type == "cuda"
    return Limits(
        max_rows=MAX_ROWS_GPU if is_gpu else MAX_ROWS_CPU,
        tokens_per_step=8192 if is_gpu else 1024,
        cache_tokens=max(1, _cache_budget_bytes(base.device) // _cache_bytes_per_token(base)),
        max_waiting=num_prompts,
    )


def _cache_bytes_per_token(base: Base) -> int:
    config = base.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    size_bytes = torch.empty(0, dtype=base.dtype).element_size()
    return int(2 * config.num_hidden_layers * key_value_heads * head_size * size_bytes)


def _cache_budget_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes // 4  # the cache is copied as it grows, and the prompts need room too
    return CACHE_BYTES_CPU
