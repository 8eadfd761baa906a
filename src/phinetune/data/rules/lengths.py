"""How many rows there are, how long they are, and how many tokens of them a model would lose.

Tokens are counted by whoever hands a counter in: this floor knows none.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phinetune.data.conversation import Example, Source
from phinetune.data.findings import Finding
from phinetune.data.rules.base import RowView, Rule

TOO_FEW = Rule(
    id="too_few_rows",
    severity="warning",
    meaning="OpenAI's and Azure's services refuse fewer than 10 examples; so few teach nothing general",
    fix="write more examples: a few thousand are advised, ten are the least",
)
FEW = Rule(
    id="few_rows",
    severity="note",
    meaning="a few thousand examples are advised for training",
    fix="write more, and watch the test loss: with few rows it rises early",
)
LENGTH_OUTLIER = Rule(
    id="length_outlier",
    severity="note",
    meaning="an answer many times longer or shorter than the others is often two rows joined, or a cut one",
    fix="look at the row; split it, complete it or drop it",
)
OVER_LONG = Rule(
    id="over_long",
    severity="warning",
    meaning="what lies beyond the sequence length is cut off; the model learns answers without an end",
    fix="shorten the row, or raise finetune_train_seqlen",
    can_clean="the row is dropped, only where asked for: --rule over_long, with --model",
)
NOTHING_TRAINED = Rule(
    id="no_trained_token",
    severity="error",
    meaning="no token of an answer lies within the sequence length: the row costs time and teaches nothing",
    fix="shorten the prompt, raise finetune_train_seqlen, or drop the row",
)

ADVISED_ROWS, LEAST_ROWS = 1000, 10
_MIN_ROWS_FOR_OUTLIERS = 20
_MAX_SPOKEN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """Tokens of one example: all, trained, and those lost beyond the sequence length."""

    num_tokens: int
    num_trained: int
    num_trained_lost: int = 0
    num_lost: int = 0


TokenCounter = Callable[[Example], TokenCount]


class LengthCheck:
    """Counts rows and answers' letters; names the answers that are far from all others."""

    def __init__(self, file: str, *, is_training_set: bool = True) -> None:
        self._file, self._is_training_set = file, is_training_set
        self._lengths, self._lines = array("I"), array("I")

    def see(self, row: RowView) -> Iterator[Finding]:
        self._lengths.append(len(row.answer))
        self._lines.append(row.source.line)
        return iter(())

    def finish(self) -> Iterator[Finding]:
        count = len(self._lengths)
        whole = Source(file=self._file, line=0)
        if 0 < count < LEAST_ROWS:
            yield TOO_FEW.finding(whole, f"{count} examples; at least {LEAST_ROWS} are needed elsewhere")
        elif 0 < count < ADVISED_ROWS and self._is_training_set:
            yield FEW.finding(whole, f"{count} examples; a few thousand are advised")
        if count < _MIN_ROWS_FOR_OUTLIERS:
            return
        lengths_R = np.frombuffer(self._lengths, dtype=np.uintc)
        # Few lengths differ, however many rows there are.
        values, counts = np.unique(lengths_R, return_counts=True)
        logs = np.log(np.maximum(values, 1))
        median = _median(logs, counts)
        # 1.4826 makes the median deviation that of a normal distribution; short labels hardly deviate.
        spread = max(1.4826 * _median(np.abs(logs - median), counts), 0.3)
        far = values[(np.abs(logs - median) / spread > 5) & (np.abs(logs - median) > np.log(8))]
        for index in np.nonzero(np.isin(lengths_R, far))[0][:_MAX_SPOKEN]:
            length, usual = self._lengths[int(index)], round(float(np.exp(median)))
            source = Source(file=self._file, line=self._lines[int(index)])
            yield LENGTH_OUTLIER.finding(
                source, f"the answer has {length:,} characters, the usual one {usual:,}"
            )


def _median(values: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """The lower median of values that stand so many times."""
    order = np.argsort(values)
    reached = np.cumsum(counts[order])
    return float(values[order][np.searchsorted(reached, (reached[-1] + 1) // 2)])


class TokenCheck:
    """Rows that a model would see cut, and rows of which nothing is trained."""

    def __init__(self, counter: TokenCounter) -> None:
        self._counter = counter
        self.num_tokens = self.num_trained = self.num_lost = 0
        self.lengths = array("I")

    def see(self, row: RowView) -> Iterator[Finding]:
        count = self._counter(row.example)
        self.num_tokens += count.num_tokens
        self.num_trained += count.num_trained - count.num_trained_lost
        self.num_lost += count.num_lost
        self.lengths.append(count.num_tokens)
        # What a labelled row teaches is its label.
        if count.num_trained - count.num_trained_lost == 0 and row.example.label is None:
            yield NOTHING_TRAINED.finding(
                row.source, f"none of its {count.num_tokens:,} tokens would be trained"
            )
        elif count.num_lost:
            share = count.num_trained_lost / max(count.num_trained, 1)
            what = f"{share:.0%} of the answer" if count.num_trained else "the end of the text"
            message = f"{count.num_tokens:,} tokens, {count.num_lost:,} too many: {what} is lost"
            yield OVER_LONG.finding(row.source, message)

    def finish(self) -> Iterator[Finding]:
        return iter(())
