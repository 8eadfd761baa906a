"""The lines of a text file, one at a time, with every fault of the encoding named.

Knows nothing of JSON. A line is held in memory, never the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

from phinetune.data.findings import Finding, excerpt

MAX_LINE_BYTES = 64 << 20

# Longest first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_UTF8_MARK = b"\xef\xbb\xbf"


def text_lines(path: Path) -> Iterator[tuple[int, str] | Finding]:
    """Each line with its 1-based number, without its line end; a Finding for one that cannot be read.

    UTF-8 with or without a byte order mark; `\\n` and `\\r\\n`. A file that cannot be read at all gives
    one Finding with line 0.
    """
    fault = file_fault(path)
    if fault is not None:
        yield fault
        return
    try:
        with path.open("rb") as file:
            yield from _decoded(file, str(path))
    except OSError as error:
        yield _whole(
            path, "unreadable", f"the file cannot be read: {error.strerror}", "check its permissions"
        )


def file_fault(path: Path) -> Finding | None:
    """Why there is nothing to read at `path`: missing, a folder, no regular file, or empty."""
    if path.is_dir():
        fix = f"name the file, for example {path / 'train.json'}"
        return _whole(path, "is_folder", "this is a folder, not a file", fix)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, siblings, n=1)
        fix = f"did you mean {path.with_name(near[0])}?" if near else "check the path"
        return _whole(path, "missing", "no such file", fix)
    if not path.is_file():
        return _whole(path, "no_file", "this is not a regular file", "copy the data into a file first")
    if path.stat().st_size == 0:
        return _whole(path, "empty", "the file is empty", "put at least one example into it")
    return None


def _decoded(file: BinaryIO, name: str) -> Iterator[tuple[int, str] | Finding]:
    head = file.read(4096)
    encoding = _foreign_encoding(head)
    if encoding:
        yield Finding(
            rule="encoding",
            severity="error",
            file=name,
            line=0,
            message=f"the file is {encoding}, not UTF-8",
            fix="save it as UTF-8 (in Notepad: Save as, Encoding: UTF-8)",
        )
        return
    file.seek(len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0)
    number = 0
    while raw := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES)
            yield too_long(name, number)
            continue
        raw = raw.rstrip(b"\r\n")
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield _undecodable(name, number, raw, error)


def _foreign_encoding(head: bytes) -> str:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    # Latin text in UTF-16 has a zero byte beside every letter; UTF-8 text has none.
    return "UTF-16 (without a byte order mark)" if head.count(0) * 4 > len(head) else ""


def _undecodable(name: str, line: int, raw: bytes, error: UnicodeDecodeError) -> Finding:
    before = raw[: error.start].decode("utf-8", errors="replace")
    return Finding(
        rule="encoding",
        severity="error",
        file=name,
        line=line,
        excerpt=excerpt(raw.decode("utf-8", errors="replace"), around=len(before)),
        message=f"byte 0x{raw[error.start]:02x} at character {len(before) + 1} is not UTF-8",
        fix="save the file as UTF-8; it may be Windows-1252 or Latin-1 now",
    )


def too_long(name: str, line: int) -> Finding:
    """The finding for a line or object above the size limit."""
    return Finding(
        rule="too_long",
        severity="error",
        file=name,
        line=line,
        message=f"longer than {MAX_LINE_BYTES >> 20} MiB",
        fix="split it into several examples",
    )


def _whole(path: Path, rule: str, message: str, fix: str) -> Finding:
    return Finding(rule=rule, severity="error", file=str(path), line=0, message=message, fix=fix)
