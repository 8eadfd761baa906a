"""Rendered rows in two files: written once, one after another, then read one at a time from the disk.

    tokens.int32   every token of every row: its id, negative minus one where it is trained
    rows.npy       of every row: tokens, trained tokens, line, whether it is a chat

Rows are read by position, not through a memory map: pages of a map count as the process's own memory
until the system takes them back, and a file that is cut short would end the process without a word.
Knows nothing of where the files lie, or of when they are still right.
"""

from __future__ import annotations

import os
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np
import numpy.typing as npt

from phinetune.base.errors import DataError
from phinetune.data.conversation import Source
from phinetune.text.render import Rendered

TOKENS_FILE, ROWS_FILE = "tokens.int32", "rows.npy"
_ROW = np.dtype([("num_tokens", "<i4"), ("num_trained", "<i4"), ("line", "<i8"), ("is_chat", "?")])

Counts = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


class CountedRows(Sequence[Rendered]):
    """Rows whose lengths are known without reading any of them: both arrays have one entry a row."""

    num_tokens: Counts
    num_trained: Counts

    def row(self, place: int) -> Rendered:
        """The row at a place from 0 up."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.num_tokens)

    @overload
    def __getitem__(self, place: int) -> Rendered: ...
    @overload
    def __getitem__(self, place: slice) -> list[Rendered]: ...
    def __getitem__(self, place: int | slice) -> Rendered | list[Rendered]:
        if isinstance(place, slice):
            return [self.row(index) for index in range(*place.indices(len(self)))]
        return self.row(range(len(self))[place])


def num_tokens_of(rows: Sequence[Rendered]) -> Sequence[int]:
    """The length of every row, quick to index, and without reading rows that know it."""
    return rows.num_tokens.data if isinstance(rows, CountedRows) else [row.num_tokens for row in rows]


def num_trained_of(rows: Sequence[Rendered]) -> Sequence[int]:
    """The trained tokens of every row, likewise."""
    if isinstance(rows, CountedRows):
        return rows.num_trained.data
    return [row.num_trained for row in rows]


def num_tokens_in(rows: Sequence[Rendered], chosen: Iterable[int]) -> int:
    """The tokens of the chosen rows together, without reading rows that know it."""
    counts = num_tokens_of(rows) if isinstance(rows, CountedRows) else None
    return sum(rows[row].num_tokens if counts is None else counts[row] for row in chosen)


def num_trained_in(rows: Sequence[Rendered], chosen: Iterable[int]) -> int:
    """The trained tokens of the chosen rows together, likewise."""
    counts = num_trained_of(rows) if isinstance(rows, CountedRows) else None
    return sum(rows[row].num_trained if counts is None else counts[row] for row in chosen)


class RowWriter:
    """Made by `writing_rows`."""

    def __init__(self, tokens: BinaryIO) -> None:
        self._tokens = tokens
        self._num_tokens, self._num_trained, self._lines = array("i"), array("i"), array("q")
        self._is_chat = bytearray()

    def add(self, rows: Iterable[Rendered], *, are_chats: Iterable[bool]) -> None:
        """Append rows."""
        for row, is_chat in zip(rows, are_chats, strict=True):
            # -1 - id, so that id 0 has a sign too.
            self._tokens.write(np.where(row.trained, ~row.ids, row.ids).astype("<i4", copy=False).tobytes())
            self._num_tokens.append(row.num_tokens)
            self._num_trained.append(row.num_trained)
            self._lines.append(row.source.line)
            self._is_chat.append(is_chat)

    def table(self) -> npt.NDArray[np.void]:
        table = np.empty(len(self._lines), _ROW)
        for name, column in (
            ("num_tokens", self._num_tokens),
            ("num_trained", self._num_trained),
            ("line", self._lines),
            ("is_chat", self._is_chat),
        ):
            table[name] = np.frombuffer(column, np.bool_) if name == "is_chat" else column
        return table


@contextmanager
def writing_rows(folder: Path) -> Iterator[RowWriter]:
    """Both files in an existing folder; they are whole when the block has ended without an error."""
    with (folder / TOKENS_FILE).open("wb", buffering=1 << 20) as tokens:
        writer = RowWriter(tokens)
        yield writer
    np.save(folder / ROWS_FILE, writer.table(), allow_pickle=False)


class StoredRows(CountedRows):
    """The rows of a folder that `writing_rows` has filled; 25 bytes of memory each.

    `is_chat` bool [N] tells conversations from plain text. Raises ValueError or OSError for files that do not
    belong together. Threads may read at once.
    """

    def __init__(self, folder: Path, *, file: str) -> None:
        """`file` is the name that the rows' sources have."""
        table = np.load(folder / ROWS_FILE, allow_pickle=False)
        if table.dtype != _ROW or table.ndim != 1:
            raise ValueError(f"{ROWS_FILE} is no table of rows")
        self.num_tokens = np.ascontiguousarray(table["num_tokens"])
        self.num_trained = np.ascontiguousarray(table["num_trained"])
        self.is_chat: Flags = np.ascontiguousarray(table["is_chat"])
        self._lines = np.ascontiguousarray(table["line"])
        self._ends = np.cumsum(self.num_tokens, dtype=np.int64)
        self._file = file
        self._handle = os.open(folder / TOKENS_FILE, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, self._handle)
        size_bytes = os.fstat(self._handle).st_size
        if len(table) and int(self.num_tokens.min()) < 1:
            raise ValueError(f"{ROWS_FILE} has rows without a token")
        num_tokens = int(self._ends[-1]) if len(table) else 0
        if size_bytes != 4 * num_tokens:
            raise ValueError(f"{TOKENS_FILE} has {size_bytes} bytes for {num_tokens} tokens")

    def row(self, place: int) -> Rendered:
        length = int(self.num_tokens[place])
        signed = self._read(int(self._ends[place]) - length, length)
        trained = signed < 0
        return Rendered(
            ids=np.where(trained, ~signed, signed),
            trained=trained,
            source=Source(file=self._file, line=int(self._lines[place])),
        )

    def _read(self, first: int, count: int) -> Counts:
        parts, missing = [], 4 * count
        with self._lock:
            os.lseek(self._handle, 4 * first, os.SEEK_SET)
            while missing and (part := os.read(self._handle, missing)):
                parts.append(part)
                missing -= len(part)
        if missing:
            raise DataError(
                "the tokenised data was cut short while it was in use",
                where=TOKENS_FILE,
                do="start again: it will be written anew",
            )
        return np.frombuffer(b"".join(parts), "<i4").astype(np.int32, copy=False)
