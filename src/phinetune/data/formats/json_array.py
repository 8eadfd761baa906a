"""The rows of a file that is one JSON array, read piece by piece: a row is in memory, never the file.

Goes on with the next row after a broken one. Knows nothing of messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from phinetune.base.errors import DataError
from phinetune.data.findings import Finding, excerpt
from phinetune.data.formats.json_lines import DECODER, Record, RefusedJSON, json_fault
from phinetune.data.formats.lines import MAX_LINE_BYTES, file_fault, too_long, unreadable
from phinetune.data.formats.streams import DAMAGE, open_bytes, text_chunks

_SPACE = re.compile(r"[\s,]*")
_FIRST_KEY = re.compile(r'\{\s*"((?:[^"\\]|\\.)*)"')
_LENIENT = json.JSONDecoder()
# A number or word that ends where the text does may go on in the next piece.
_NEAR_END = 16


def read_array(path: Path) -> Iterator[Record | Finding]:
    """Each element of the array, or a Finding for what cannot be parsed."""
    if (fault := file_fault(path)) is not None:
        yield fault
        return
    try:
        with open_bytes(path) as stream:
            yield from _ArrayReader(str(path), text_chunks(stream)).rows()
    except (DataError, *DAMAGE, OSError) as error:
        yield unreadable(path, error)


class _ArrayReader:
    """Holds the text from the row that is open to the end of the last piece read."""

    def __init__(self, file: str, chunks: Iterator[tuple[str, bool]]) -> None:
        self._file, self._chunks = file, chunks
        self._text, self._at, self._line = "", 0, 1
        self._damaged_line = 0
        self._num_rows = 0
        self._counts_rows = False  # where rows share a line, their number is their place
        self._indent = ""  # a newline and what stands between it and the row
        self._next_row: re.Pattern[str] | None = None  # how rows begin here, as the first one did

    def rows(self) -> Iterator[Record | Finding]:
        self._more()
        self._skip(re.compile(r"\s*\["))
        is_closed = False
        while True:
            self._skip(_SPACE)
            if self._at >= len(self._text):
                if not self._more():
                    break
                continue
            if self._text[self._at] == "]":
                is_closed = True
                break
            if not self._num_rows:
                self._next_row, self._counts_rows = self._beginning(), not self._indent
            self._num_rows += 1
            yield from self._row()
            if self._damaged_line:
                yield self._error(
                    "encoding", "bytes near here are not of the file's encoding", "save it as UTF-8", ""
                )
                self._damaged_line = 0
        if not is_closed:
            yield self._error(
                "json", "the array is never closed", "the file may be cut short; end it with ]", ""
            )
            return
        self._at += 1
        yield from self._after_the_end()

    def _after_the_end(self) -> Iterator[Finding]:
        self._skip(_SPACE)
        while self._at >= len(self._text) and self._more():
            self._skip(_SPACE)
        rest = self._text[self._at :].strip()
        if rest:
            fix = "keep one array in a file, or write one object per line"
            yield self._error("json", "something follows the array", fix, rest)

    def _beginning(self) -> re.Pattern[str]:
        """Rows of a file begin at one indentation, or else with one key."""
        if self._indent:
            return re.compile(rf"\n[ \t]{{0,{len(self._indent) - 1}}}(?=[{{\]])")
        key = _FIRST_KEY.match(self._text, self._at)
        return re.compile(rf',\s*(?=\{{\s*"{re.escape(key.group(1))}")' if key else r"\n\s*(?=[{\]])")

    def _row(self) -> Iterator[Record | Finding]:
        start = self._num_rows if self._counts_rows else self._line
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except RecursionError:
                yield self._error(
                    "nesting", "nested too deeply", "a row needs only messages and their keys", ""
                )
                self._recover(self._at)
                return
            except RefusedJSON as error:
                yield json_fault(self._file, start, self._text[self._at : self._at + 200], error)
                self._step_over()
                return
            except json.JSONDecodeError as error:
                if self._may_go_on(error.pos, error.msg) and self._more():
                    continue
                if len(self._text) - self._at > MAX_LINE_BYTES:
                    yield too_long(self._file, start)
                else:
                    yield self._broken(start, error)
                self._recover(error.pos)
                return
            except ValueError as error:
                yield json_fault(self._file, start, self._text[self._at : self._at + 200], error)
                self._recover(self._at)
                return
            if end >= len(self._text) - 1 and self._more():
                continue
            yield Record(start, value)
            self._move(end)
            return

    def _broken(self, start: int, error: json.JSONDecodeError) -> Finding:
        text = self._text[self._at : error.pos + 200]
        moved = json.JSONDecodeError(error.msg, text, error.pos - self._at)
        return json_fault(self._file, start, text, moved)

    def _may_go_on(self, position: int, message: str) -> bool:
        if len(self._text) - self._at > MAX_LINE_BYTES:
            return False
        return position >= len(self._text) - _NEAR_END or message.startswith("Unterminated string")

    def _step_over(self) -> None:
        """Past a row that is JSON, but not as it was meant."""
        while True:
            try:
                _, end = _LENIENT.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):
                if len(self._text) - self._at <= MAX_LINE_BYTES and self._more():
                    continue
                self._recover(self._at)
            else:
                self._move(end)
            return

    def _recover(self, position: int) -> None:
        """To the next place where a row may begin, which is always further on."""
        position = max(position, self._at + 1)
        pattern = self._next_row or _SPACE
        while True:
            position = min(position, len(self._text))
            if found := pattern.search(self._text, position):
                self._move(found.end())
                return
            self._move(max(position, len(self._text) - 4096))
            position = 0
            if not self._more():
                self._move(len(self._text))
                return

    def _skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self._text, self._at)
        if found:
            _, newline, indent = found.group().rpartition("\n")
            self._indent = newline + indent if newline else self._indent
            self._move(found.end())

    def _move(self, position: int) -> None:
        self._line += self._text.count("\n", self._at, position)
        self._at = position

    def _more(self) -> bool:
        """Read on; what lies before the open row is let go. Doubles: a long row is parsed few times."""
        wanted = max(1, len(self._text) - self._at)
        parts, size = [self._text[self._at :]], 0
        while size < wanted:
            piece = next(self._chunks, None)
            if piece is None:
                break
            parts.append(piece[0])
            size += len(piece[0])
            if piece[1]:
                self._damaged_line = self._line
        if size:
            self._text, self._at = "".join(parts), 0
        return size > 0

    def _error(self, rule: str, message: str, fix: str, text: str) -> Finding:
        return Finding(
            rule=rule,
            severity="error",
            file=self._file,
            line=self._line,
            excerpt=excerpt(text),
            message=message,
            fix=fix,
        )
