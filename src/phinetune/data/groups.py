"""Groups from pairs: whoever is linked, however far, is in one group. Knows nothing of what is grouped."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


class Groups:
    """Numbers below `size`, each alone at first. A number takes four bytes, whatever its group.

    >>> groups = Groups(4)
    >>> groups.join(2, 0); groups.join(2, 3); list(groups.all())
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

    def others(self) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """All members but the firsts, and the first of each: by first, then in order."""
        above = np.frombuffer(self._above, dtype=self._above.typecode)
        numbers = np.flatnonzero(above != np.arange(len(above), dtype=above.dtype))
        firsts = np.fromiter((self.first(int(number)) for number in numbers), above.dtype, len(numbers))
        order = np.argsort(firsts, kind="stable")
        return firsts[order], numbers[order]

    def all(self) -> Iterator[list[int]]:
        """The groups of two and more, each in order, by their first."""
        firsts, numbers = self.others()
        borders = np.flatnonzero(np.diff(firsts, prepend=-1, append=-1))
        for begin, end in pairwise(borders):
            yield [int(firsts[begin]), *numbers[begin:end].tolist()]
