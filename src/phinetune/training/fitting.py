"""Make rendered examples fit their sequences, losing nothing without being told to.

Plain text longer than a sequence is split into consecutive pieces. A chat is refused, cut or left
out, as the settings say; what happened is returned, never hidden. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phinetune.base.errors import DataError
from phinetune.data.conversation import Source
from phinetune.text.render import Rendered
from phinetune.text.row_files import CountedRows, num_tokens_of, num_trained_of

NUM_SHOWN = 20
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Examples that fit, with the indices of the examples they came from and what it took."""

    rendered: Sequence[Rendered]
    indices: Sequence[int]
    num_cut: int
    num_dropped: int
    num_split: int


class _Pieces(CountedRows):
    """Rows of which some are cut, split or left out; each is cut when it is asked for."""

    def __init__(self, rows: Sequence[Rendered], indices: Places, starts: Places, seqlen: int) -> None:
        num_tokens = np.asarray(num_tokens_of(rows), np.int64)[indices]
        self._rows, self._indices, self._starts = rows, indices, starts
        self.num_tokens = np.minimum(num_tokens - starts, seqlen).astype(np.int32)
        self.num_trained = np.asarray(num_trained_of(rows), np.int32)[indices]
        for place in np.flatnonzero(num_tokens > self.num_tokens):
            self.num_trained[place] = self.row(int(place)).num_trained

    def row(self, place: int) -> Rendered:
        row, start = self._rows[int(self._indices[place])], int(self._starts[place])
        stop = start + int(self.num_tokens[place])
        if stop - start == row.num_tokens:
            return row
        trained = row.trained[start:stop].copy()
        trained[:1] = False  # the token before it is in another piece
        return Rendered(ids=row.ids[start:stop], trained=trained, source=row.source)


def fit(
    rows: Sequence[Rendered],
    are_chats: Sequence[bool] | npt.NDArray[np.bool_],
    seqlen: int,
    overlong: str,
    setting: str,
) -> Fitted:
    """Fit rows into `seqlen` tokens. `setting` is the name of the limit, for messages.

    Only rows that are too long are read. Raises `DataError` naming the lines when chats are too long and
    `overlong` is "error", when cutting would leave a chat without a trained token, and when nothing is left.
    """
    num_tokens = np.asarray(num_tokens_of(rows), np.int64)
    is_chat = np.asarray(are_chats, np.bool_)
    is_long = num_tokens > seqlen
    is_cut = is_long & is_chat
    if overlong != "drop":
        _refuse_too_long(rows, np.flatnonzero(is_cut), seqlen, setting, is_cut_allowed=overlong == "cut")
    num_dropped = int(is_cut.sum()) if overlong == "drop" else 0
    if num_dropped == len(rows):
        raise nothing_left(num_dropped, seqlen, setting)
    if not is_long.any():
        return Fitted(rendered=rows, indices=range(len(rows)), num_cut=0, num_dropped=0, num_split=0)
    # A piece begins with the last token of the one before, so that no target is lost.
    num_pieces = np.where(is_long & ~is_chat, -(-(num_tokens - 1) // (seqlen - 1)), 1)
    if overlong == "drop":
        num_pieces[is_cut] = 0
    indices = np.repeat(np.arange(len(rows)), num_pieces)
    firsts = np.cumsum(num_pieces) - num_pieces
    starts = (np.arange(len(indices)) - firsts[indices]) * (seqlen - 1)
    return Fitted(
        rendered=_Pieces(rows, indices, starts, seqlen),
        indices=indices.data,
        num_cut=int(is_cut.sum()) - num_dropped,
        num_dropped=num_dropped,
        num_split=int((is_long & ~is_chat).sum()),
    )


def nothing_left(num_dropped: int, seqlen: int, setting: str) -> DataError:
    """The refusal of a data set without an example of at most `seqlen` tokens, or without any."""
    if not num_dropped:
        return DataError("no example is left", where=setting, why="the data set is empty", do="add examples")
    return DataError(
        "no example is left",
        where=setting,
        why=f"all {num_dropped} are longer than {seqlen} tokens and overlong is 'drop'",
        do=f"write a larger {setting}, or overlong: cut",
    )


def _refuse_too_long(
    rows: Sequence[Rendered], places: Places, seqlen: int, setting: str, *, is_cut_allowed: bool
) -> None:
    """Raise for chats that are too long: all of them, or those that a cut would leave without a target."""
    faults = []
    for place in places.tolist():
        row = rows[place]
        num_kept = int(row.trained[:seqlen].sum())
        if not is_cut_allowed or not num_kept:
            faults.append((row.source, row.num_tokens, row.num_trained, row.num_trained - num_kept))
    if faults:
        raise _too_long(faults, seqlen, setting)


def _too_long(faults: Sequence[tuple[Source, int, int, int]], seqlen: int, setting: str) -> DataError:
    """The refusal: every line while they are few, and what a cut would cost the longest."""
    source, num_tokens, num_trained, num_lost = max(faults, key=lambda fault: fault[1])
    lines = ", ".join(str(source.line) for source, *_ in faults[:NUM_SHOWN])
    more = f" and {len(faults) - NUM_SHOWN} more" if len(faults) > NUM_SHOWN else ""
    number = "1 example is" if len(faults) == 1 else f"{len(faults)} examples are"
    return DataError(
        f"{number} longer than {seqlen} tokens",
        where=f"{source.file}, line{'s' if len(faults) > 1 else ''} {lines}{more}",
        why=f"the longest, line {source.line}, has {num_tokens} tokens; "
        f"a cut would lose {num_lost} of its {num_trained} trained tokens",
        do=f"write {setting}: {num_tokens}; or overlong: cut, or overlong: drop; or shorten them",
    )
