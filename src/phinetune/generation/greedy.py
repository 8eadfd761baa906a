"""Greedy continuation of prompts: in batches for evaluation, one by one as a stream for chat.

Ids in, ids out: knows nothing of text, templates or adapters. Works on any transformers decoder with
that decoder's own key/value cache, and never with the segment attention of training.

Shapes: B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from phinetune.base.errors import UserError
from phinetune.generation.mode import answering

if TYPE_CHECKING:
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
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The greedy answer to each prompt, in the order given, without the stop token.

    An answer ends at a stop token, after `max_new_tokens`, or where the model's context is full.
    Prompts are sorted by length and answered many at a time; a finished row leaves its batch.
    `on_progress(done, total)` counts prompts, after each batch.

    Raises `UserError` when a prompt is empty or leaves no room in the model's context.
    """
    _check(base, prompts)
    num_done = 0
    answers: list[list[int]] = [[] for _ in prompts]
    for rows in _batches(base, prompts, max_new_tokens):
        for step in _decode(base, [prompts[row] for row in rows], max_new_tokens, frozenset(stop_ids)):
            for index, token in step:
                answers[rows[index]].append(token)
        num_done += len(rows)
        if on_progress:
            on_progress(num_done, len(prompts))
    return answers


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBatch:
    """Prompts that `generate_batch` answers together: their places, the longest, the full cache's bytes."""

    rows: tuple[int, ...]
    longest_prompt: int
    cache_bytes: int


def answer_batches(base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[AnswerBatch]:
    """How `generate_batch` would divide these prompts."""
    found = []
    for rows in _batches(base, prompts, max_new_tokens):
        longest = max(len(prompts[row]) for row in rows)
        size_bytes = len(rows) * (longest + max_new_tokens) * _cache_bytes_per_token(base)
        found.append(AnswerBatch(rows=tuple(rows), longest_prompt=longest, cache_bytes=size_bytes))
    return found


def stream(
    base: Base, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """The tokens of one greedy answer as they come; close the iterator to stop early.

    Between two tokens the model is as it was before the call.

    Raises `UserError` at once when the prompt is empty or leaves no room in the model's context.
    """
    _check(base, [prompt])
    return _stream(base, prompt, max_new_tokens, frozenset(stop_ids))


def _stream(
    base: Base, prompt: Sequence[int], max_new_tokens: int, stop_ids: frozenset[int]
) -> Iterator[int]:
    for step in _decode(base, [prompt], max_new_tokens, stop_ids):
        yield from (token for _, token in step)


def _check(base: Base, prompts: Sequence[Sequence[int]]) -> None:
    usable = base.max_length - 1
    for index, prompt in enumerate(prompts):
        where = f"prompt {index + 1} of {len(prompts)}"
        if not len(prompt):
            raise UserError("a prompt has no tokens", where=where, do="give at least one token")
        if len(prompt) > usable:
            raise UserError(
                f"a prompt of {len(prompt):,} tokens does not fit this model",
                where=where,
                why=f"prompt and answer share a context of {usable + 1:,} tokens; "
                f"the longest usable prompt has {usable:,}",
                do="shorten the prompt; nothing is cut silently",
            )


def _batches(base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[int]]:
    """Rows to answer together: neighbours in length, as many as the cache budget holds."""
    border = base.longrope_limit or 0
    bytes_per_token, budget_bytes = _cache_bytes_per_token(base), _cache_budget_bytes(base.device)
    max_rows = MAX_ROWS_GPU if base.device.type == "cuda" else MAX_ROWS_CPU
    batch: list[int] = []
    # Longest first: memory is asked for at its largest at once, not after an hour.
    for row in sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row)):
        length = len(prompts[row])
        if border and length <= border < length + max_new_tokens:
            yield [row]
            continue
        longest = len(prompts[batch[0]]) if batch else length
        fits = (len(batch) + 1) * (longest + max_new_tokens) * bytes_per_token <= budget_bytes
        mixed = bool(border) and length <= border < longest
        if batch and (len(batch) >= max_rows or not fits or mixed):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


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
        return free_bytes // 4  # the cache is copied as it grows, and the prompt pass needs room too
    return CACHE_BYTES_CPU


def _decode(
    base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: frozenset[int]
) -> Iterator[list[tuple[int, int]]]:
    """Per step the (row, token) of every row that goes on; rows end at a stop token or at their limit."""
    limits = [min(max_new_tokens, base.max_length - len(prompt)) for prompt in prompts]
    rows = [row for row, limit in enumerate(limits) if limit > 0]
    batch = _Batch(base, [prompts[row] for row in rows]) if rows else None
    num_done = 0
    while batch is not None:
        tokens = batch.step()
        num_done += 1
        going = [(row, token) for row, token in zip(rows, tokens, strict=True) if token not in stop_ids]
        if going:
            yield going
        keep = [
            index
            for index, (row, token) in enumerate(zip(rows, tokens, strict=True))
            if token not in stop_ids and num_done < limits[row]
        ]
        if not keep:
            return
        if len(keep) < len(rows):
            batch.keep(keep)
            rows = [rows[index] for index in keep]


class _Batch:
    """Rows of unequal length on one key/value cache, padded on the left."""

    def __init__(self, base: Base, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        device = base.device
        self._base = base
        self._cache = DynamicCache(config=base.model.config)
        self._border = base.longrope_limit or 0
        # Every id so far; padding is id 0, which the mask hides.
        self._ids_BT = torch.tensor(
            [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=device
        )
        self._padding_B = torch.tensor(padding, device=device)
        self._num_cached = 0

    def step(self) -> list[int]:
        """The next token of every row; it is taken into the sequence."""
        length = self._ids_BT.shape[1]
        if len(self._ids_BT) == 1 and 0 < self._border == length - 1:
            # LongRoPE now turns earlier keys differently too: what is cached is no longer true.
            self._cache = DynamicCache(config=self._base.model.config)
            self._num_cached = 0
        with answering(self._base):
            logits_BV = self._last_logits(length)
            next_B = logits_BV.argmax(dim=-1)
        self._num_cached = length
        self._ids_BT = torch.cat([self._ids_BT, next_B[:, None]], dim=1)
        tokens: list[int] = next_B.tolist()
        return tokens

    def _last_logits(self, length: int) -> Tensor:
        at_T = torch.arange(length, device=self._ids_BT.device)
        positions_BT = (at_T - self._padding_B[:, None]).clamp(min=0)
        output = self._base.model(
            input_ids=self._ids_BT[:, self._num_cached :],
            attention_mask=(at_T >= self._padding_B[:, None]).long(),
            position_ids=positions_BT[:, self._num_cached :],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        index_B = torch.tensor(rows, device=self._ids_BT.device)
        self._ids_BT = self._ids_BT[index_B]
        self._padding_B = self._padding_B[index_B]
        self._cache.batch_select_indices(index_B)
