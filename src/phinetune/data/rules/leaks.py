"""Training rows that share their prompt, or thirteen words in a row, with a row of the test set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from phinetune.data.findings import Finding
from phinetune.data.rules.base import RowCheck, RowView, Rule, squeezed
from phinetune.data.rules.duplicates import key_of, loosened

LEAK_PROMPT = Rule(
    id="leak_prompt",
    severity="warning",
    meaning="the model has seen this test prompt; it may remember the answer rather than find it",
    fix="drop it from the training set: phinetune data clean --test FILE",
    can_clean="with --test the training row is dropped",
)
LEAK_OVERLAP = Rule(
    id="leak_overlap",
    severity="note",
    meaning="thirteen words in a row of a test row stand in training: a quotation, or a copied row",
    fix="look at the row; drop it from the training set if it is the same content",
)
NUM_WORDS = 13
_COMMON_SHARE = 0.01


class LeakCheck(RowCheck):
    """Keeps the prompts and runs of words of the test set as numbers."""

    def __init__(self, test_rows: Iterable[RowView]) -> None:
        self._prompts: dict[int, str] = {}
        runs: Counter[int] = Counter()
        num_rows = 0
        for row in test_rows:
            num_rows += 1
            if row.prompt.strip():
                self._prompts.setdefault(_prompt_key(row), str(row.source))
            runs.update(set(_runs(row).tolist()))
        # A run that many test rows share is the wording of the task.
        limit = max(2, int(num_rows * _COMMON_SHARE))
        self._runs = np.array(sorted(run for run, count in runs.items() if count <= limit), dtype=np.uint64)

    def see(self, row: RowView) -> Iterator[Finding]:
        if row.prompt.strip() and (place := self._prompts.get(_prompt_key(row))):
            yield LEAK_PROMPT.finding(row.source, f"its prompt is that of {place}", seen=row.prompt)
            return
        runs = _runs(row)
        if len(runs) and len(self._runs):
            places = np.minimum(np.searchsorted(self._runs, runs), len(self._runs) - 1)
            if is_shared := (self._runs[places] == runs).sum():
                message = f"{int(is_shared)} runs of {NUM_WORDS} words stand in the test set too"
                yield LEAK_OVERLAP.finding(row.source, message, seen=row.prompt or row.answer)


def _prompt_key(row: RowView) -> int:
    return key_of(squeezed(row.system), loosened(row.prompt))


def _runs(row: RowView) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A hash of every thirteen words in a row of prompt and answer."""
    found = []
    for its_words in (row.prompt_words, row.answer_words):
        if len(its_words) < NUM_WORDS:
            continue
        hashes = np.array([key_of(word) for word in its_words], dtype=np.uint64)
        mixed = np.zeros(len(hashes) - NUM_WORDS + 1, dtype=np.uint64)
        for place in range(NUM_WORDS):
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + len(mixed)]
        found.append(mixed)
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)
