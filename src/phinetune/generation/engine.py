"""The engine: many requests on one base, each with its own adapter or none, a step at a time.

Requests join and leave between steps. A step computes one token of every row that decodes and chunks of
the prompts that are still being read, all laid end to end as segments of one forward pass.

    waiting lines --admit--> rows on slots --step--> tokens --> finished, slot free

Ids in, ids out: knows nothing of text, templates or of who asks. Every public method may be called from
any thread.

# T tokens of a step, N rows whose next token is due
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phinetune.base.errors import UserError
from phinetune.generation.adapters import AdapterRegistry, Loaded
from phinetune.generation.cache import KeyValueCache, Span, StepAttention
from phinetune.generation.mixing import MixedLayers
from phinetune.generation.mode import without_dropout
from phinetune.generation.prefixes import PrefixCache
from phinetune.generation.request import Request, Row, State
from phinetune.generation.sampling import Choice, Dice, choose, scored
from phinetune.generation.scheduler import Limits, WaitingLines, chunks
from phinetune.lora.attach import require_bare
from phinetune.lora.weights import AdapterWeights

if TYPE_CHECKING:
    from phinetune.models.loading import Base

# Steps with more tokens than this are filled up to a multiple of it: a CPU's matrix library prepares
# code for every new shape.
TOKENS_MULTIPLE = 64


class Engine:
    """Answers requests on `base`, which it leaves as it found it between steps.

    `close` takes the mixed layers out of the model again; the engine is also a context manager.
    """

    def __init__(self, base: Base, limits: Limits | None = None) -> None:
        self._base = base
        self.limits = limits or Limits()
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._waiting = WaitingLines(self.limits.max_waiting)
        self._running: list[Row] = []
        self._leases: dict[int, Loaded] = {}
        self._long: set[int] = set()
        self._ended: list[Row] = []
        self._cache = KeyValueCache()
        self._prefixes = PrefixCache(self.limits.prefix_cache_bytes)
        self._layers: MixedLayers | None = None
        self._registry: AdapterRegistry | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel everything and put the model's own layers back."""
        with self._alone():
            for row in [*self._running, *self._waiting]:
                self.cancel(row)
            if self._layers:
                self._layers.remove()
            self._layers = self._registry = None

    # Adapters

    def load(self, name: str, adapter: Path | AdapterWeights) -> int:
        """Add or replace an adapter; returns its version. Requests on their way keep the old one.

        Raises `AdapterError` when it does not fit, `SettingsError` when the model has one attached.
        """
        with self._alone():
            return self._adapters().load(name, adapter)

    def unload(self, name: str) -> None:
        """Take an adapter away; requests that run with it end with it, those that wait for it fail."""
        with self._alone():
            self._adapters().unload(name)

    @property
    def adapters(self) -> list[str]:
        with self._lock:
            return self._registry.names if self._registry else []

    def _adapters(self) -> AdapterRegistry:
        if self._registry is None:
            require_bare(self._base.model)
            self._layers = MixedLayers(self._base.model)
            self._registry = AdapterRegistry(
                self._layers,
                base_sha256=self._base.sha256,
                limits=self.limits,
            )
        return self._registry

    # Requests

    def submit(self, request: Request) -> Row:
        """Put a request in line; its row tells how it goes.

        Raises `UserError` for a prompt that is empty or too long, an unknown adapter, or a full line.
        """
        with self._lock:
            self._check(request)
            row = Row(number=next(self._numbers), request=request, dice=Dice(request.sampling.seed))
            row.constraint = request.grammar.start() if request.grammar else None
            if request.max_new_tokens <= 0:
                row.become(State.RUNNING)
                row.become(State.FINISHED, "length")
            else:
                self._waiting.add(row)
            return row

    def cancel(self, row: Row, reason: str = "cancelled") -> None:
        """End a request now; its slot is free for the next step. One that is over stays as it is."""
        with self._alone():
            if row.state is State.WAITING:
                self._waiting.remove(row)
                row.become(State.CANCELLED, reason)
            elif row.state is State.RUNNING:
                self._leave(row, State.CANCELLED, reason)

    def follow(self, row: Row) -> Iterator[int]:
        """The answer's tokens as they come; closing the iterator cancels the request."""
        num_given = 0
        try:
            while True:
                while num_given < len(row.tokens):
                    num_given += 1
                    yield row.tokens[num_given - 1]
                if row.is_over:
                    return
                self.step()
        finally:
            self.cancel(row)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._running and not len(self._waiting)

    def step(self) -> list[Row]:
        """One step for all rows; returns those that got a token or ended.

        A failure of the computation ends the rows of the step as failed and is raised.
        """
        with self._alone(), without_dropout(self._base):
            self._ended = []
            self._cancel_overdue()
            self._waiting.admit(self._take)
            for row in self._running:
                self._turn_long(row)
            parts = chunks(self._running, self.limits.tokens_per_step)
            moved: list[Row] = []
            try:
                for is_long in (False, True):
                    group = [part for part in parts if (part[0].number in self._long) is is_long]
                    if group:
                        moved += self._advance(group, is_long)
            except Exception as error:
                for row, _ in parts:
                    if row.state is State.RUNNING:
                        self._leave(row, State.FAILED, str(error))
                raise
            return [*moved, *(row for row in self._ended if row not in moved)]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread, and no gradients: seats and cache are written in inference mode only."""
        with self._lock, torch.inference_mode():
            yield

    def _check(self, request: Request) -> None:
        usable = self._base.max_length - 1
        if not request.prompt:
            raise UserError("a prompt has no tokens", do="give at least one token")
        if len(request.prompt) > usable:
            raise UserError(
                f"a prompt of {len(request.prompt):,} tokens does not fit this model",
                why=f"prompt and answer share a context of {usable + 1:,} tokens; "
                f"the longest usable prompt has {usable:,}",
                do="shorten the prompt; nothing is cut silently",
            )
        if request.adapter is not None:
            self._adapters().find(request.adapter)

    def _length_limit(self, row: Row) -> int:
        """Most ids that prompt and answer can come to."""
        return min(len(row.request.prompt) + row.request.max_new_tokens, self._base.max_length)

    def _cancel_overdue(self) -> None:
        now = time.monotonic()
        for row in [*self._running, *self._waiting]:
            if row.request.deadline is not None and now >= row.request.deadline:
                self.cancel(row, "deadline")
                self._ended.append(row)

    def _take(self, row: Row) -> bool:
        """Give a waiting row a slot and a seat; False when there is none for it now."""
        capacity = max([self._length_limit(row), *(self._length_limit(other) for other in self._running)])
        num_rows = len(self._running) + 1
        is_full = num_rows > self.limits.max_rows or num_rows * capacity > self.limits.cache_tokens
        if self._running and is_full:
            return False
        name = row.request.adapter
        if name is not None:
            registry = self._adapters()
            if name not in registry:
                row.become(State.FAILED, f"the adapter '{name}' was unloaded")
                self._ended.append(row)
                return True
            lease = registry.lease(name)
            if lease is None:
                return False
            self._leases[row.number], row.seat = lease, lease.seat
        row.slot = num_rows - 1  # slots in use are always the first ones
        row.become(State.RUNNING)
        self._running.append(row)
        if num_rows > self._cache.num_slots:
            num_rows = min(2 * num_rows, self.limits.max_rows)
        self._cache.ensure(num_rows, capacity)
        self._turn_long(row)
        self._recall(row)
        return True

    def _owner(self, row: Row) -> tuple[int, bool]:
        """Whose keys and values a row's are."""
        lease = self._leases.get(row.number)
        return (lease.version if lease else 0, row.number in self._long)

    def _recall(self, row: Row) -> None:
        """Start from a beginning that was computed before, if there is one."""
        found = self._prefixes.find(self._owner(row), row.request.prompt)
        if found and not row.request.echo:
            content, row.num_cached = found
            self._cache.write(row.slot, content, row.num_cached)

    def _turn_long(self, row: Row) -> None:
        """LongRoPE turns every key of a row differently once the row is long: it is read anew then."""
        border = self._base.longrope_limit
        if border and row.num_ids > border and row.number not in self._long:
            self._long.add(row.number)
            row.num_cached = 0

    def _leave(self, row: Row, state: State, reason: str) -> None:
        """End a running row: its slot goes to the row on the last one, its lease back."""
        row.become(state, reason)
        self._running.remove(row)
        self._long.discard(row.number)
        lease = self._leases.pop(row.number, None)
        if lease and self._registry:
            self._registry.release(lease)
        last = next((other for other in self._running if other.slot == len(self._running)), None)
        if last:
            self._cache.move(last.slot, row.slot, last.num_cached)
            last.slot = row.slot
        row.slot = -1
        if not self._running:
            self._cache.clear()

    def _advance(self, parts: Sequence[tuple[Row, int]], is_long: bool) -> list[Row]:
        """Compute the parts' tokens; the rows whose next token became known."""
        spans = []
        ids: list[int] = []
        seats: list[int] = []
        for row, count in parts:
            spans.append(Span(slot=row.slot, first=len(ids), position=row.num_cached, length=count))
            ids += row.ids(row.num_cached, count)
            seats += [row.seat] * count
        hidden_TH = self._forward(ids, seats, spans, is_long)
        due = []
        last_N = []
        for (row, count), span in zip(parts, spans, strict=True):
            if row.request.echo:
                self._echo(row, span, hidden_TH)
            row.num_cached += count
            if row.num_cached == row.num_ids:
                due.append(row)
                last_N.append(span.first + count - 1)
        if due:
            logits_NV = self._base.head_logits(hidden_TH[torch.tensor(last_N)])
            self._choose(due, logits_NV)
        return due

    def _forward(self, ids: list[int], seats: list[int], spans: Sequence[Span], is_long: bool) -> Tensor:
        """The last hidden states, (T, hidden)."""
        positions = [span.position + i for span in spans for i in range(span.length)]
        num_singles = sum(1 for _ in itertools.takewhile(lambda span: span.length == 1, spans))
        filling = -len(ids) % TOKENS_MULTIPLE if len(ids) > TOKENS_MULTIPLE else 0
        filling = max(filling, int(is_long))
        # transformers chooses the factors of LongRoPE by the longest position of a forward pass.
        border = (self._base.longrope_limit or 0) if is_long else 0
        if self._layers:
            self._layers.mix.begin(seats, filling)
        device = self._base.device
        out = self._base.model.get_decoder()(
            input_ids=torch.tensor([ids + [0] * filling], device=device),
            position_ids=torch.tensor([positions + [border] * filling], device=device),
            use_cache=False,
            cached=StepAttention(self._cache, spans[:num_singles], spans[num_singles:]),
        )
        hidden_TH: Tensor = out.last_hidden_state[0]
        return hidden_TH

    def _echo(self, row: Row, span: Span, hidden_TH: Tensor) -> None:
        """What the model gives to the prompt's tokens that follow those of the span."""
        prompt = row.request.prompt
        places = range(span.position + 1, min(span.end + 1, len(prompt)))
        if not places or places[0] <= len(row.prompt_choices):  # a long row is read twice
            return
        logits_NV = self._base.head_logits(hidden_TH[span.first : span.first + len(places)])
        num = row.request.sampling.num_logprobs or 0
        row.prompt_choices += [
            scored(logits_V, prompt[place], num) for place, logits_V in zip(places, logits_NV, strict=True)
        ]

    def _choose(self, rows: Sequence[Row], logits_NV: Tensor) -> None:
        likeliest_N = logits_NV.argmax(dim=-1).tolist()
        for index, row in enumerate(rows):
            request = row.request
            if not row.tokens and self._prefixes.wants(self._owner(row), request.prompt):
                content = self._cache.read(row.slot, len(request.prompt))
                self._prefixes.add(self._owner(row), request.prompt, content)
            if row.constraint or not request.sampling.is_plain_greedy:
                logits_V = row.constraint.allow(logits_NV[index]) if row.constraint else logits_NV[index]
                choice = choose(logits_V, request.sampling, request.prompt, row.tokens, row.dice)
            else:
                choice = Choice(token=likeliest_N[index])
            if choice.token in request.stop_ids:
                self._leave(row, State.FINISHED, "stop")
                continue
            row.tokens.append(choice.token)
            if request.sampling.num_logprobs is not None:
                row.choices.append(choice)
            if row.constraint:
                row.constraint.accept(choice.token)
            if row.constraint and row.constraint.is_complete:
                self._leave(row, State.FINISHED, "stop")
            elif row.num_ids >= self._length_limit(row):
                self._leave(row, State.FINISHED, "length")
