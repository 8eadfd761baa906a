"""JSON objects that stand one after another in a file: on one line each, or indented over several.

Finds broken JSON and goes on with the next object. Knows nothing of messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.data.findings import Finding, excerpt
from phinetune.data.formats.lines import MAX_LINE_BYTES, text_lines

# Keys that only a row has at its top: an object that holds one begins anew after a broken one.
ROW_KEYS = frozenset({"messages", "text", "conversations", "instruction", "prompt", "preferred_output"})


@dataclass(frozen=True, slots=True)
class Record:
    """A parsed JSON value and the line it begins on."""

    line: int
    value: object


class RefusedJSON(ValueError):
    """JSON that Python would read, but not as it was meant."""

    def __init__(self, rule: str, message: str, fix: str) -> None:
        super().__init__(message)
        self.rule, self.message, self.fix = rule, message, fix


def read_records(path: Path) -> Iterator[Record | Finding]:
    """Each object of the file, or a Finding for what cannot be parsed. Holds one object in memory."""
    reader = _RecordReader(str(path))
    for item in text_lines(path):
        if isinstance(item, Finding):
            yield from reader.abandon(item)
        else:
            yield from reader.take(*item)
    yield from reader.finish()


class _RecordReader:
    """Joins lines until an object is whole, and finds the next object after a broken one."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._skipping = False
        self._indent = 0  # of the object that is open, or of the last broken one
        self._clear()

    def _clear(self) -> None:
        self._lines: list[str] = []
        self._start = self._depth = self._size = 0

    def take(self, number: int, line: str) -> Iterator[Record | Finding]:
        if self._lines and self._begins_anew(line):
            yield self._unclosed()
        if self._lines:
            yield from self._continue(number, line)
            return
        if not line.strip():
            return
        if self._skipping and not (line.lstrip()[0] == "{" and _indent(line) <= self._indent):
            return
        self._skipping = False
        yield from self._begin(number, line)

    def finish(self) -> Iterator[Finding]:
        if self._lines:
            yield self._unclosed()

    def abandon(self, fault: Finding) -> Iterator[Finding]:
        """A line could not be read: the object it belongs to is lost."""
        self._skipping = self._skipping or bool(self._lines)
        self._clear()
        yield fault

    def _begin(self, number: int, line: str) -> Iterator[Record | Finding]:
        try:
            value = parse(line)
        except ValueError as error:
            depth, _ = balance(line)
            if not _is_cut_short(error, line):
                self._skipping, self._indent = depth > 0, _indent(line)
                yield self._fault(number, line, error)
            else:
                self._lines, self._start, self._depth = [line], number, depth
                self._indent, self._size = _indent(line), len(line)
        else:
            yield Record(number, value)

    def _continue(self, number: int, line: str) -> Iterator[Record | Finding]:
        self._lines.append(line)
        self._size += len(line)
        depth, is_open_string = balance(line)
        self._depth += depth
        if self._depth > 0 and not is_open_string and self._size <= MAX_LINE_BYTES:
            return
        text, start = "\n".join(self._lines), self._start
        try:
            yield Record(start, parse(text))
        except ValueError as error:
            # Lines up to the next object at this indentation may still belong to the broken one.
            self._skipping = True
            yield self._fault(start, text, error)
        self._clear()

    def _begins_anew(self, line: str) -> bool:
        """Whether a line must be a new object although the one before is still open."""
        if not line.lstrip().startswith("{") or _indent(line) > self._indent:
            return False
        last = next(text for text in reversed(self._lines) if text.strip()).rstrip()[-1]
        if last not in "[,:":
            return True
        if line.strip() == "{":
            return self._lines[0].strip() != "{"
        try:
            value = parse(line)
        except ValueError:
            return False
        return isinstance(value, dict) and not value.keys().isdisjoint(ROW_KEYS)

    def _unclosed(self) -> Finding:
        text = "\n".join(self._lines).rstrip()
        start, first = self._start, self._lines[0]
        self._clear()
        try:
            parse(text)
        except ValueError as error:
            if not _is_cut_short(error, text):
                return self._fault(start, text, error)
        message = "the object that begins on this line is never closed"
        return self._error("json", start, message, "add the missing ] or }", first)

    def _fault(self, start: int, text: str, error: ValueError) -> Finding:
        return json_fault(self.file, start, text, error)

    def _error(self, rule: str, line: int, message: str, fix: str, text: str) -> Finding:
        return _finding(self.file, rule, line, message, fix, excerpt(text))


def json_fault(file: str, start: int, text: str, error: ValueError) -> Finding:
    """What `error` says of JSON `text` that begins on line `start`."""
    if isinstance(error, RefusedJSON):
        return _finding(file, error.rule, start, error.message, error.fix, excerpt(text))
    if not isinstance(error, json.JSONDecodeError):
        return _finding(
            file, "number", start, "a number is too long to be read", "write it as text", excerpt(text)
        )
    line = start + error.lineno - 1
    begins = f" (the object begins on line {start})" if line != start else ""
    message, fix = _explained(error)
    message = f"broken JSON at column {error.colno}: {message}{begins}"
    return _finding(file, "json", line, message, fix, excerpt(text, error.pos))


def _finding(file: str, rule: str, line: int, message: str, fix: str, seen: str) -> Finding:
    return Finding(rule=rule, severity="error", file=file, line=line, excerpt=seen, message=message, fix=fix)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        message = f"the key {excerpt(double)!r} stands twice in one object"
        raise RefusedJSON("duplicate_key", message, "keep one of them")
    return found


def _constant(name: str) -> None:
    raise RefusedJSON("not_finite", f"{name} is not JSON", "write a number, null, or leave the key out")


DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def parse(text: str) -> object:
    """A JSON value. Raises ValueError: JSONDecodeError, RefusedJSON, or Python's own for huge numbers."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise RefusedJSON(
            "nesting", "nested too deeply", "a row needs only messages and their keys"
        ) from None


_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"')


def balance(line: str) -> tuple[int, bool]:
    """Brackets opened minus closed outside strings, and whether a string is left open at the end."""
    bare = _STRING.sub("", line)
    depth = sum(bare.count(char) for char in "{[") - sum(bare.count(char) for char in "}]")
    return depth, '"' in bare


def _is_cut_short(error: ValueError, text: str) -> bool:
    """Whether the JSON is sound as far as it goes and only ends too early, not inside a string."""
    if not isinstance(error, json.JSONDecodeError) or error.msg.startswith("Unterminated string"):
        return False
    return error.pos >= len(text.rstrip()) and balance(text)[0] > 0


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


_EXPLAINED = {
    "Expecting property name": (
        "a key in double quotes is expected",
        'write "key": …; single quotes and a comma before } are not JSON',
    ),
    "Illegal trailing comma": ("a comma before ] or }", "delete the comma"),
    "Expecting ',' delimiter": (
        "a comma or a closing bracket is expected",
        'close or separate the values; write a quote inside text as \\"',
    ),
    "Expecting ':' delimiter": ("a colon is expected after the key", 'write "key": value'),
    "Expecting value": (
        "a value is expected",
        "write text in double quotes; null, true and false in small letters",
    ),
    "Invalid control character": (
        "a raw tab or another control character inside text",
        "write a line break as \\n and a tab as \\t",
    ),
    "Invalid \\escape": ("a backslash that begins no escape", "write a backslash as \\\\"),
    "Invalid \\uXXXX escape": ("\\u needs four hexadecimal digits", "write a backslash as \\\\"),
    "Unterminated string": (
        "the text that begins here is not closed on this line",
        'close it with "; write a line break inside text as \\n',
    ),
    "Extra data": (
        "something follows the object",
        "one object per line, without a comma after it",
    ),
}


def _explained(error: json.JSONDecodeError) -> tuple[str, str]:
    if error.msg == "Extra data" and error.doc[error.pos :].lstrip().startswith(","):
        return "a comma follows the object", "delete the comma; rows need none between them"
    for begin, explained in _EXPLAINED.items():
        if error.msg.startswith(begin):
            return explained
    return error.msg, "correct the JSON"
