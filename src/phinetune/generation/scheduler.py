"""Which requests come in next, and which tokens the coming step computes. Pure decisions.

Rows that decode come first, one token each; what is left of the step's token budget goes to prompts in
chunks, oldest first, so that a long prompt never stops the others. Requests wait in one line per adapter,
and the lines take turns. Knows nothing of models, caches or threads.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from phinetune.base.errors import UserError
from phinetune.generation.request import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much an engine takes on.

    A step computes at most `tokens_per_step` tokens, of at most `max_rows` rows; all rows together may hold
    `cache_tokens` keys and values, each as many as the longest; `max_waiting` requests wait at most.
    While one adapter alone is loaded its steps go through merged weights, a copy of the adapted layers, where
    these take no more than `merged_bytes`. 0 never merges: in bfloat16 a merged weight is rounded, so that a
    row's numbers would depend on which adapters are loaded.
    """

    max_rows: int = 32
    tokens_per_step: int = 512
    cache_tokens: int = 65_536
    max_waiting: int = 1024
    max_seats: int = 16
    max_resident: int = 64
    prefix_cache_bytes: int = 256 << 20
    merged_bytes: int = 0


class WaitingLines:
    """Requests that wait, first come first served within an adapter, adapters in turn."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._lines: OrderedDict[str | None, deque[Row]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __iter__(self) -> Iterator[Row]:
        for line in self._lines.values():
            yield from line

    def add(self, row: Row) -> None:
        """Raises `UserError` when the line is full."""
        if len(self) >= self._max_waiting:
            raise UserError(
                "too many requests are waiting",
                why=f"{self._max_waiting:,} wait already",
                do="ask again later",
            )
        self._lines.setdefault(row.request.adapter, deque()).append(row)

    def remove(self, row: Row) -> None:
        line = self._lines[row.request.adapter]
        line.remove(row)
        if not line:
            del self._lines[row.request.adapter]

    def admit(self, take: Callable[[Row], bool]) -> None:
        """Offer the first of each line by turns to `take`, until it refuses the first of every line."""
        refused: set[str | None] = set()
        while open_lines := [name for name in self._lines if name not in refused]:
            name = open_lines[0]
            if not take(self._lines[name][0]):
                refused.add(name)
                continue
            self._lines[name].popleft()
            if self._lines[name]:
                self._lines.move_to_end(name)
            else:
                del self._lines[name]


def chunks(rows: Sequence[Row], tokens_per_step: int) -> list[tuple[Row, int]]:
    """Each row with the number of its ids that the coming step computes: decoding rows, short, long chunks.

    The order of `rows` is their age. A row that finds no room in the budget waits for the next step.
    """
    singles = [(row, 1) for row in rows if row.num_ids - row.num_cached == 1]
    left = max(tokens_per_step - len(singles), 1)
    parts = []
    for row in rows:
        missing = row.num_ids - row.num_cached
        if missing > 1 and left:
            parts.append((row, min(missing, left)))
            left -= parts[-1][1]
    return singles + sorted(parts, key=lambda part: part[1])
