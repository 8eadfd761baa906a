"""Numbers about millions of rows in temporary files, of which a part is in memory. Knows nothing of rows.

A row costs nothing in memory here: not being held is the point. Files vanish when they are closed.

# R rows, B columns
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

_NUM_WAITING = 4096
_PART_ROWS = 1 << 19
_READ_ROWS = 1 << 16


class RecordSpool:
    """Records of one NumPy type, written one by one, read by their numbers or as one field of all.

    >>> with RecordSpool([("key", "u8"), ("line", "i4")]) as spool:
    ...     spool.add(7, 1); spool.add(9, 2)
    ...     spool.field("key").tolist(), spool.at(np.array([1]))["line"].tolist()
    ([7, 9], [2])
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._file = _temporary()
        self._waiting: list[tuple[Any, ...]] = []
        self._num_written = 0

    def __len__(self) -> int:
        return self._num_written + len(self._waiting)

    def add(self, *record: Any) -> None:
        """One record, a value for each field."""
        self._waiting.append(record)
        if len(self._waiting) >= _NUM_WAITING:
            self._write()

    def extend(self, **fields: NDArray[Any]) -> None:
        """Many records, an array for each field."""
        block = np.empty(len(next(iter(fields.values()))), dtype=self._dtype)
        for name, values in fields.items():
            block[name] = values
        self._write()
        self._append(block)

    def at(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """The records of these numbers, in their order."""
        self._write()
        size = self._dtype.itemsize
        wanted, places = np.unique(numbers, return_inverse=True)
        found = bytearray()
        for number in wanted.tolist():
            self._file.seek(number * size)
            found += self._file.read(size)
        return np.frombuffer(bytes(found), dtype=self._dtype)[places]

    def field(self, name: str) -> NDArray[Any]:
        """One field of every record, (R,)."""
        self._write()
        values = np.empty(len(self), dtype=self._dtype[name])
        self._file.seek(0)
        for start in range(0, len(self), _READ_ROWS):
            count = min(_READ_ROWS, len(self) - start)
            block = np.frombuffer(self._file.read(count * self._dtype.itemsize), dtype=self._dtype)
            values[start : start + count] = block[name]
        return values

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self) -> None:
        if self._waiting:
            block = np.array(self._waiting, dtype=self._dtype)
            self._waiting = []
            self._append(block)

    def _append(self, block: NDArray[Any]) -> None:
        self._file.seek(0, 2)
        self._file.write(block.tobytes())
        self._num_written += len(block)


class TableSpool:
    """A table of 32-bit numbers, written in blocks of rows and read column by column."""

    def __init__(self, num_columns: int) -> None:
        self._file = _temporary()
        self._num_columns = num_columns
        self._block_rows: list[int] = []

    def extend(self, block_RB: NDArray[np.uint32]) -> None:
        """More rows."""
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(block_RB.T, dtype=np.uint32).tobytes())
        self._block_rows.append(len(block_RB))

    def column(self, number: int) -> NDArray[np.uint32]:
        """One column of every row, (R,)."""
        values = np.empty(sum(self._block_rows), dtype=np.uint32)
        start = 0
        for num_rows in self._block_rows:
            self._file.seek(4 * (start * self._num_columns + number * num_rows))
            values[start : start + num_rows] = np.frombuffer(self._file.read(4 * num_rows), dtype=np.uint32)
            start += num_rows
        return values

    def close(self) -> None:
        self._file.close()


def equal_runs(keys_R: NDArray[Any], is_wanted_R: NDArray[np.bool_] | None = None) -> Iterator[NDArray[Any]]:
    """Rows that share their key with an earlier one, (3, later rows): the first, the one before, the row.

    Comes in parts by key: what sorting takes stays small, however many rows there are. Every part is in the
    order of its keys, rows of one key in their own.
    """
    num_parts = len(keys_R) // _PART_ROWS + 1
    for part in range(num_parts):
        numbers = _numbers_of_part(keys_R, is_wanted_R, part, num_parts)
        keys = keys_R[numbers]
        order = np.argsort(keys, kind="stable")
        numbers, keys = numbers[order], keys[order]
        is_first = np.ones(len(keys), dtype=bool)
        is_first[1:] = keys[1:] != keys[:-1]
        firsts = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
        later = np.nonzero(~is_first)[0]
        if len(later):
            yield np.stack([numbers[firsts[later]], numbers[later - 1], numbers[later]])


def _numbers_of_part(
    keys_R: NDArray[Any], is_wanted_R: NDArray[np.bool_] | None, part: int, num_parts: int
) -> NDArray[np.int64]:
    """The wanted rows whose keys leave `part` when divided; no second array of all keys is made."""
    found = []
    for start in range(0, len(keys_R), _READ_ROWS):
        span = slice(start, start + _READ_ROWS)
        is_here = keys_R[span] % keys_R.dtype.type(num_parts) == part
        found.append(start + np.flatnonzero(is_here if is_wanted_R is None else is_here & is_wanted_R[span]))
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _temporary() -> BinaryIO:
    """With a small buffer: what is read lies far apart."""
    return cast("BinaryIO", tempfile.TemporaryFile(buffering=1024, prefix="phinetune-"))
