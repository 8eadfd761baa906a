"""Groups from pairs: whoever is linked, however far, is in one group. Knows nothing of what is grouped."""

from __future__ import annotations

from array import array
from collections import defaultdict


class Groups:
    """Numbers below `size`, each alone at first.

    >>> groups = Groups(4)
    >>> groups.join(2, 0); groups.join(2, 3); groups.all()
    [[0, 2, 3]]
    """

    def __init__(self, size: int) -> None:
        self._above = array("i" if size < 1 << 31 else "q", range(size))

    def first(self, number: int) -> int:
        """The least member of a number's group."""
        while self._above[number] != number:
            self._above[number] = self._above[self._above[number]]
            number = self._above[number]
        return number

    def join(self, one: int, other: int) -> None:
        """Make two groups one."""
        low, high = sorted((self.first(one), self.first(other)))
        self._above[high] = low

    def all(self) -> list[list[int]]:
        """The groups of two and more, each in order, by their first."""
        found: dict[int, list[int]] = defaultdict(list)
        for number in range(len(self._above)):
            if (first := self.first(number)) != number:
                found[first].append(number)
        return [[first, *members] for first, members in sorted(found.items())]
