"""A request for text and its life: waiting -> running -> finished | cancelled | failed.

Ids in, ids out. Knows nothing of models, caches or of the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from phinetune.base.seeds import derive
from phinetune.generation.sampling import GREEDY, Choice, Dice, Sampling

if TYPE_CHECKING:
    from phinetune.generation.constraints import Constraint, Grammar


class State(StrEnum):
    """Where a request is in its life; the last three are final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


_NEXT = {
    State.WAITING: {State.RUNNING, State.CANCELLED, State.FAILED},
    State.RUNNING: {State.FINISHED, State.CANCELLED, State.FAILED},
    State.FINISHED: set(),
    State.CANCELLED: set(),
    State.FAILED: set(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for.

    `adapter` is None for the base, `grammar` a form that the answer must have, and `deadline` a time of
    `time.monotonic`. With `echo` the prompt's own tokens get log-probabilities too.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    adapter: str | None = None
    sampling: Sampling = GREEDY
    stop_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    deadline: float | None = None
    echo: bool = False

    def variants(self, num: int) -> list[Request]:
        """`num` requests that differ in their seeds only; the first keeps its own."""
        seed = self.sampling.seed
        seeds = [seed, *(derive(seed, "variant", index) for index in range(1, num))]
        return [replace(self, sampling=replace(self.sampling, seed=own)) for own in seeds]


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """A request on its way. The engine writes it, whoever asked reads it.

    `reason` says how it ended: stop (a stop token), length (its limit, or the context is full),
    cancelled, deadline, or the words of a failure. The stop token is not among `tokens`.
    """

    number: int
    request: Request
    dice: Dice
    state: State = State.WAITING
    reason: str = ""
    tokens: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    # With `echo`: the prompt's tokens from the second on, with what the model gave them.
    prompt_choices: list[Choice] = field(default_factory=list)
    constraint: Constraint | None = None
    # Where its keys and values are, and how many of its ids they cover.
    slot: int = -1
    num_cached: int = 0
    # The adapter it was admitted with: an adapter of that name loaded later is not its own.
    seat: int = 0

    @property
    def is_over(self) -> bool:
        return not _NEXT[self.state]

    @property
    def num_ids(self) -> int:
        """Ids of prompt and answer so far."""
        return len(self.request.prompt) + len(self.tokens)

    def ids(self, first: int, count: int) -> Sequence[int]:
        """`count` ids of prompt and answer from `first` on."""
        length = len(self.request.prompt)
        if first >= length:
            return self.tokens[first - length : first - length + count]
        return [*self.request.prompt[first : first + count], *self.tokens[: max(0, first + count - length)]]

    def become(self, state: State, reason: str = "") -> None:
        """Go on to `state`. Raises `ValueError` for a way that a life cannot take."""
        if state not in _NEXT[self.state]:
            raise ValueError(f"request {self.number} cannot go from {self.state} to {state}")
        self.state, self.reason = state, reason
