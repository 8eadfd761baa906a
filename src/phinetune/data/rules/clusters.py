"""How many families of wording there are: rows that share most of their content words with a first one.

Counted on an even sample of the rows, so that it takes a second however large the file. Knows no meanings:
two ways to ask for one thing in other words are two families.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from phinetune.data.conversation import Source
from phinetune.data.findings import Finding
from phinetune.data.rules.base import RowView, Rule
from phinetune.data.rules.language import SMALL_WORDS

FEW_CLUSTERS = Rule(
    id="few_clusters",
    severity="note",
    meaning="most prompts are one sentence with other names in it; people will ask in other words",
    fix="write prompts in other words; keep them if users fill in a form",
)
_NUM_SAMPLED = 1500
_MIN_ROWS = 50
_SAME_FAMILY = 0.6
_NUM_FEATURES = 512
_MAX_WORDS = 120
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """Families of wording among `num_rows` rows of a sample; `largest` shows the first row of the largest."""

    num_rows: int = 0
    num_clusters: int = 0
    num_in_largest: int = 0
    largest: str = ""

    @property
    def largest_share(self) -> float:
        return self.num_in_largest / max(self.num_rows, 1)


class ClusterCheck:
    """Keeps the words of a sample of rows as bits."""

    def __init__(self, file: str) -> None:
        self._whole = Source(file=file, line=0)
        self._rng = random.Random(0)
        self._sample: list[tuple[bytes, str]] = []
        self._num_rows = 0
        self.clusters = Clusters()

    def see(self, row: RowView) -> Iterator[Finding]:
        self._num_rows += 1
        # Each row so far stays with the same chance.
        place = len(self._sample)
        if place >= _NUM_SAMPLED:
            place = self._rng.randrange(self._num_rows)
        if place < _NUM_SAMPLED:
            text = row.prompt or row.answer
            its_words = row.prompt_words if row.prompt else row.answer_words
            entry = (_features(its_words), text[:80])
            self._sample[place : place + 1] = [entry]
        return iter(())

    def finish(self) -> Iterator[Finding]:
        self.clusters = clusters_of(self._sample)
        found = self.clusters
        if found.num_rows >= _MIN_ROWS and found.largest_share > 0.5:
            message = f"{found.largest_share:.0%} of the prompts are worded like one"
            yield FEW_CLUSTERS.finding(self._whole, message, seen=found.largest)


def _features(its_words: list[str]) -> bytes:
    bits = np.zeros(_NUM_FEATURES, dtype=bool)
    for word in its_words[:_MAX_WORDS]:
        if word not in SMALL_WORDS:
            bits[zlib.crc32(_NUMBER.sub("0", word).encode("utf-8", "surrogatepass")) % _NUM_FEATURES] = True
    return np.packbits(bits).tobytes()


def clusters_of(sample: list[tuple[bytes, str]]) -> Clusters:
    """Each row joins the first family whose first row it shares enough words with, or begins one."""
    if not sample:
        return Clusters()
    packed = np.frombuffer(b"".join(bits for bits, _ in sample), dtype=np.uint8).reshape(len(sample), -1)
    rows_RF = np.unpackbits(packed, axis=1).astype(np.float32)
    rows_RF /= np.maximum(np.linalg.norm(rows_RF, axis=1, keepdims=True), 1)
    firsts: list[int] = []
    sizes: list[int] = []
    first_rows = np.empty_like(rows_RF)
    for number, row in enumerate(rows_RF):
        likeness = first_rows[: len(firsts)] @ row
        if len(firsts) and (best := int(likeness.argmax())) >= 0 and likeness[best] >= _SAME_FAMILY:
            sizes[best] += 1
            continue
        first_rows[len(firsts)] = row
        firsts.append(number)
        sizes.append(1)
    largest = int(np.argmax(sizes))
    return Clusters(
        num_rows=len(sample),
        num_clusters=len(firsts),
        num_in_largest=sizes[largest],
        largest=sample[firsts[largest]][1],
    )
