"""Rows of a CSV or TSV file, by the names of its columns. Knows nothing of messages."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from phinetune.data.findings import Finding, excerpt
from phinetune.data.formats.json_lines import Record
from phinetune.data.formats.lines import MAX_LINE_BYTES, text_lines

TABLE_SUFFIXES = (".csv", ".tsv")
_DELIMITERS = (",", "\t", ";", "|")


def delimiter_of(first_line: str) -> str:
    """What separates the columns: the candidate that stands most often outside quotes in the first line.

    >>> delimiter_of('question;"a, b, c";answer')
    ';'
    """
    bare = "".join(first_line.split('"')[::2])
    counts = {delimiter: bare.count(delimiter) for delimiter in _DELIMITERS}
    best = max(counts, key=lambda delimiter: counts[delimiter])
    return best if counts[best] else ","


def read_table(path: Path) -> Iterator[Record | Finding]:
    """Each row as a dict by column, or a Finding. The first line names the columns."""
    lines = _Lines(path)
    first = next(iter(lines), None)
    yield from lines.faults()
    if first is None:
        return
    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter = delimiter_of(first)
    try:
        columns = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
    except csv.Error:
        columns = []
    if not columns or len(set(columns)) < len(columns) or not all(columns):
        fix = "the first line names the columns: give each one name of its own"
        yield _fault(path, lines.number, "columns", "a column has no name or the name of another", fix, first)
        return
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = lines.number + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            fix = 'write a quote inside quotes twice: "say ""yes"""'
            yield _fault(path, start, "table", f"the row cannot be read: {error}", fix, "")
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            continue
        yield from lines.faults()
        if row is None:
            return
        if not any(row):
            continue
        if len(row) != len(columns):
            message = f"{len(row)} columns, the first line names {len(columns)}"
            fix = "put text that holds the separator into quotes"
            yield _fault(path, start, "table", message, fix, delimiter.join(row))
            continue
        yield Record(start, dict(zip(columns, row, strict=True)))


class _Lines:
    """Lines for the csv module, with their number; faults of the encoding wait until they are asked for."""

    def __init__(self, path: Path) -> None:
        self._items = text_lines(path)
        self._faults: list[Finding] = []
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for item in self._items:
            if isinstance(item, Finding):
                self._faults.append(item)
                continue
            self.number = item[0]
            return item[1] + "\n"
        raise StopIteration

    def faults(self) -> Iterator[Finding]:
        found, self._faults = self._faults, []
        yield from found


def _fault(path: Path, line: int, rule: str, message: str, fix: str, text: str) -> Finding:
    return Finding(
        rule=rule,
        severity="error",
        file=str(path),
        line=line,
        excerpt=excerpt(text),
        message=message,
        fix=fix,
    )
