"""Find leading tokens that several examples of a batch have in common, such as a system prompt.

They are computed once, and the rest of each example attends to them. Only tokens that no example trains
are shared, and only where the token after them is not trained either: what a position must predict is
then the same nothing for all. Knows nothing of tensors on devices or of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from phinetune.text.layout import Ids
from phinetune.text.render import Rendered

# Fewer common tokens are not worth a segment of their own: 16 of 100 cost the demo model 6 % of its pace.
MIN_SHARED_TOKENS = 20
# Attention over a prefix and a rest longer than this costs more than a shorter prefix saves: kernels for
# long segments know no prefix (benchmarks/attention_cpu.py).
LONG_REST = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """The first `num_tokens` ids of the examples `members` are the same; members are places in the batch."""

    num_tokens: int
    members: tuple[int, ...]

    @property
    def num_saved(self) -> int:
        """Tokens that need not be computed."""
        return self.num_tokens * (len(self.members) - 1)


def shared_prefixes(examples: Sequence[Rendered]) -> list[SharedPrefix]:
    """The prefixes worth sharing, the one that saves most first; an example is a member of one at most.

    >>> import numpy as np
    >>> from phinetune.data.conversation import Source
    >>> rows = [Rendered(ids=np.array([*range(30), last]), trained=np.arange(31) == 30,
    ...                  source=Source(file="x", line=1)) for last in (40, 41)]
    >>> shared_prefixes(rows)
    [SharedPrefix(num_tokens=29, members=(0, 1))]
    """
    leading = [shareable(example) for example in examples]
    able = [place for place, ids in enumerate(leading) if len(ids) >= MIN_SHARED_TOKENS]
    # In the order of their bytes, examples with a common beginning are neighbours.
    able.sort(key=lambda place: (leading[place].tobytes(), place))
    common = [num_common(leading[a], leading[b]) for a, b in pairwise(able)]
    found = []
    for num_tokens, first, end in _largest_blocks(common):
        members = [i for i in able[first : end + 1] if _is_worth(num_tokens, examples[i])]
        if len(members) > 1:
            found.append(SharedPrefix(num_tokens=num_tokens, members=tuple(sorted(members))))
    return sorted(found, key=lambda shared: (-shared.num_saved, shared.members))


def num_added(first: Rendered, example: Rendered) -> int:
    """About the tokens that an example adds to a batch that begins with `first`: cheap, to cut batches by."""
    num_same = num_common(shareable(first), shareable(example))
    return example.num_tokens - (num_same if _is_worth(num_same, example) else 0)


def _is_worth(num_shared: int, example: Rendered) -> bool:
    return num_shared >= MIN_SHARED_TOKENS and example.num_tokens - num_shared <= max(LONG_REST, num_shared)


def shareable(example: Rendered) -> Ids:
    """The leading ids that may be shared: those that predict no trained token, and never all of them."""
    first = int(example.trained.argmax())
    end = first if example.trained[first] else example.num_tokens
    return example.ids[: max(0, end - 1)]


def num_common(one: Ids, other: Ids) -> int:
    """The number of leading ids that are the same."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


def _largest_blocks(common: list[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of neighbours that save most: number of tokens, first and end of the run in `common`.

    Greedy: the largest is taken, then the largest to its left and to its right.
    """
    waiting = [(0, len(common))]
    while waiting:
        low, high = waiting.pop()
        height, first, end = _largest_rectangle(common, low, high)
        if height >= MIN_SHARED_TOKENS:
            yield height, first, end
            # The neighbours beside the run lose their common tokens with an example that is taken.
            waiting += [(low, first - 1), (end + 1, high)]


def _largest_rectangle(heights: list[int], low: int, high: int) -> tuple[int, int, int]:
    """The largest height x width under heights[low:high]: height, first and end. Heights below the least do
    not count."""
    best = (0, low, low)
    most = 0
    rising: list[tuple[int, int]] = []  # height, and the first place from which on it is reached
    for place in range(low, high + 1):
        height = heights[place] if place < high else 0
        first = place
        while rising and rising[-1][0] >= height:
            taller, first = rising.pop()
            if taller >= MIN_SHARED_TOKENS and taller * (place - first) > most:
                most, best = taller * (place - first), (taller, first, place)
        rising.append((height, first))
    return best
