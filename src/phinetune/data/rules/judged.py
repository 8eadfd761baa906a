"""What is judged by something handed in from above: harm by a content filter, doubt by a model's loss."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

import numpy as np

from phinetune.data.conversation import Example, Source
from phinetune.data.findings import Finding
from phinetune.data.rules.base import RowView, Rule

TOXIC = Rule(
    id="toxic",
    severity="note",
    meaning="a model that is shown hateful, sexual, violent or self-harming text learns to write it; the "
    "bundled filter is weak and marks strong feelings too: a list to read, not a verdict",
    fix="read the row, and drop it unless it is meant",
    can_clean="the row is dropped, only where asked for: --rule toxic",
)
DOUBTFUL = Rule(
    id="label_noise",
    severity="note",
    meaning="the base finds this answer far less likely than the others: a wrong label or a hard row",
    fix="read the row; correct the answer if it is wrong",
)

# What harm a text does, as "hate, medium", or "" for none.
Judge = Callable[[str], str]
# The base's mean loss per trained token of an example.
LossOf = Callable[[Example], float]
_MAX_DOUBTFUL = 100
_MIN_ROWS = 20
_MIN_CHARS = 20


class ToxicCheck:
    """Judges the first rows of a file, or all of them; says how many."""

    def __init__(self, judge: Judge, *, max_rows: int | None = None) -> None:
        self._judge, self._max_rows = judge, max_rows
        self.num_judged = 0

    def see(self, row: RowView) -> Iterator[Finding]:
        if self._max_rows is not None and self.num_judged >= self._max_rows:
            return
        self.num_judged += 1
        text = f"{row.prompt}\n{row.answer}".strip()
        # A word alone, such as a label, says too little; what is said of a row stands without an excerpt, for
        # reports are read by people who did not ask for it.
        if len(text) >= _MIN_CHARS and (harm := self._judge(text)):
            yield TOXIC.finding(row.source, f"the content filter says: {harm}")

    def finish(self) -> Iterator[Finding]:
        return iter(())


class DoubtCheck:
    """Ranks rows by the base's loss; those far above the rest are doubtful."""

    def __init__(self, file: str, loss_of: LossOf) -> None:
        self._file, self._loss_of = file, loss_of
        self._losses, self._lines = array("d"), array("L")

    def see(self, row: RowView) -> Iterator[Finding]:
        self._losses.append(self._loss_of(row.example))
        self._lines.append(row.source.line)
        return iter(())

    def finish(self) -> Iterator[Finding]:
        losses_R = np.array(self._losses)
        if len(losses_R) < _MIN_ROWS:
            return
        median = float(np.median(losses_R))
        spread = max(1.4826 * float(np.median(np.abs(losses_R - median))), 1e-6)
        z_R = (losses_R - median) / spread
        ranked = np.argsort(-z_R, kind="stable")[:_MAX_DOUBTFUL]
        for rank, index in enumerate(ranked[z_R[ranked] > 3.5], 1):
            source = Source(file=self._file, line=self._lines[int(index)])
            message = f"doubtful, rank {rank}: loss {losses_R[index]:.2f}, the usual one {median:.2f}"
            yield DOUBTFUL.finding(source, f"{message} (z {z_R[index]:.1f})")
