"""The lines of a text file, one at a time, with every fault of the encoding named.

Knows nothing of JSON. A line is held in memory, never the file.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

from phinetune.base.errors import DataError
from phinetune.data.findings import Finding, excerpt
from phinetune.data.formats.streams import DAMAGE, encoding_of, open_bytes

MAX_LINE_BYTES = 64 << 20


def text_lines(path: Path) -> Iterator[tuple[int, str] | Finding]:
    """Each line with its 1-based number, without its line end; a Finding for one that cannot be read.

    UTF-8, UTF-16 and UTF-32, with or without a byte order mark; `\\n` and `\\r\\n`; gzip, xz and zstd. A file
    that cannot be read at all gives one Finding with line 0.
    """
    fault = file_fault(path)
    if fault is not None:
        yield fault
        return
    try:
        with open_bytes(path) as file:
            yield from _decoded(file, str(path))
    except (DataError, *DAMAGE, OSError) as error:
        yield unreadable(path, error)


def unreadable(path: Path, error: Exception) -> Finding:
    """The finding for a file whose bytes cannot be had."""
    if isinstance(error, DataError):
        return _whole(path, "unreadable", error.what, error.do)
    if isinstance(error, DAMAGE):
        fix = "copy it again, or pack it anew; what could be read of it stands above"
        return _whole(path, "damaged", f"the packed file is damaged or cut short: {error}", fix)
    reason = getattr(error, "strerror", None) or error
    return _whole(path, "unreadable", f"the file cannot be read: {reason}", "check its permissions")


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
    encoding, mark = encoding_of(head)
    if encoding != "utf-8":
        yield from _wide(head[mark:], file, encoding, name)
        return
    rest: BinaryIO = _Rejoined(head[mark:], file)  # a packed stream cannot be sought in
    number = 0
    while raw := rest.readline(MAX_LINE_BYTES):
        number += 1
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = rest.readline(MAX_LINE_BYTES)
            yield too_long(name, number)
            continue
        raw = raw.rstrip(b"\r\n")
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield _undecodable(name, number, raw, error)


class _Rejoined(io.BytesIO):
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        super().__init__(head)
        self._file = file

    def readline(self, size: int | None = -1) -> bytes:
        size = -1 if size is None else size
        line = super().readline(size)
        if line.endswith(b"\n") or len(line) == size:
            return line
        return line + self._file.readline(size - len(line) if size >= 0 else -1)


def _wide(head: bytes, file: BinaryIO, encoding: str, name: str) -> Iterator[tuple[int, str] | Finding]:
    """Lines of UTF-16 and UTF-32. A half of a character passes: the row that holds it is named later."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    number, open_line, block = 0, "", head
    while True:
        following = file.read(1 << 20)
        try:
            text = open_line + decoder.decode(block, final=not following)
        except UnicodeDecodeError as error:
            fix = "save the file anew as UTF-8"
            message = f"the {encoding.upper()} text breaks here: {error.reason}"
            yield Finding(
                rule="encoding", severity="error", file=name, line=number + 1, message=message, fix=fix
            )
            return
        *lines, open_line = text.split("\n")
        for line in lines:
            number += 1
            yield number, line.rstrip("\r")
        if len(open_line) > MAX_LINE_BYTES:
            yield too_long(name, number + 1)
            return
        if not following:
            break
        block = following
    if open_line.strip("\r"):
        yield number + 1, open_line.rstrip("\r")


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
