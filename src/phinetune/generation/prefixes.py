"""Keys and values of prompts seen lately, so that a common beginning is computed once.

An entry belongs to one version of one adapter: another one's keys are other numbers. Knows nothing of
requests or of where rows keep theirs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np

from phinetune.generation.cache import SlotContent

# A shorter beginning is not worth a copy: a chat's control tokens are common to all.
MIN_TOKENS = 16

Owner = Hashable


class PrefixCache:
    """Least lately used prompts go first when `max_bytes` are exceeded; 0 keeps none."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[tuple[Owner, bytes], tuple[SlotContent, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def find(self, owner: Owner, ids: Sequence[int]) -> tuple[SlotContent, int] | None:
        """The entry that shares the longest beginning with `ids`, and how many tokens that is.

        The last id is never covered: its logits are wanted.
        """
        wanted = np.asarray(ids[:-1], dtype=np.int32)
        best_key, best_length = None, MIN_TOKENS - 1
        for key in self._entries:
            if key[0] == owner:
                length = _common(np.frombuffer(key[1], dtype=np.int32), wanted)
                if length > best_length:
                    best_key, best_length = key, length
        if best_key is None:
            return None
        self._entries.move_to_end(best_key)
        return self._entries[best_key][0], best_length

    def wants(self, owner: Owner, ids: Sequence[int]) -> bool:
        """Whether the prompt is worth keeping: long enough, and not the beginning of one that is kept."""
        if not self._max_bytes or len(ids) < MIN_TOKENS:
            return False
        content = np.asarray(ids, dtype=np.int32).tobytes()
        return not any(key[0] == owner and key[1].startswith(content) for key in self._entries)

    def add(self, owner: Owner, ids: Sequence[int], content: SlotContent) -> None:
        size = sum(part.nbytes for pair in content.values() for part in pair)
        if size > self._max_bytes:
            return
        key = (owner, np.asarray(ids, dtype=np.int32).tobytes())
        self._entries[key] = (content, size)
        self._num_bytes += size
        while self._num_bytes > self._max_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self._num_bytes -= freed


def _common(left_N: np.ndarray, right_M: np.ndarray) -> int:
    """The length of the common beginning."""
    size = min(len(left_N), len(right_M))
    differs = np.flatnonzero(left_N[:size] != right_M[:size])
    return int(differs[0]) if len(differs) else size
