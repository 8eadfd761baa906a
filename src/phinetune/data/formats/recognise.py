"""What kind of file it is, from its first bytes and rows: packing, encoding, line ends, format, row form.

The name decides only where the content leaves it open. Knows nothing of rules.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from phinetune.base.errors import DataError
from phinetune.data.findings import Finding
from phinetune.data.formats.columns import COLUMN_SUFFIXES, is_dataset_folder, read_columns, read_folder
from phinetune.data.formats.json_array import read_array
from phinetune.data.formats.json_lines import Record, read_records
from phinetune.data.formats.lines import file_fault, unreadable
from phinetune.data.formats.row_forms import ReadOptions, form_name
from phinetune.data.formats.streams import (
    COMPRESSED_SUFFIXES,
    DAMAGE,
    compression_of,
    encoding_of,
    open_bytes,
)
from phinetune.data.formats.table import TABLE_SUFFIXES, delimiter_of, read_table
from phinetune.data.formats.text import MARKDOWN_SUFFIXES, read_documents

Container = Literal[
    "JSON Lines", "JSON array", "CSV", "TSV", "Parquet", "Arrow", "datasets folder", "plain text", "Markdown"
]
NUM_ROWS_LOOKED_AT = 20
_HEAD_BYTES = 1 << 16
PLAIN_SUFFIXES = (".txt", ".tokens", ".raw", *MARKDOWN_SUFFIXES)
JSON_SUFFIXES = (".json", ".jsonl")
SUFFIXES = (*JSON_SUFFIXES, *PLAIN_SUFFIXES, *TABLE_SUFFIXES, *COLUMN_SUFFIXES)
_MARKED = {"utf-8": "UTF-8", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16 (big endian)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileForm:
    """What a file is. `rows` names the form of its first rows, "" where there are none."""

    container: Container
    rows: str = ""
    compression: str = ""
    encoding: str = "utf-8"
    has_mark: bool = False
    has_windows_line_ends: bool = False
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For people.

        >>> str(FileForm(container="CSV", rows="prompt and completion", has_windows_line_ends=True))
        'CSV of prompt and completion, Windows line ends'
        """
        parts = [f"{self.container} of {self.rows}" if self.rows else self.container]
        if self.encoding != "utf-8":
            parts.append(_MARKED.get(self.encoding, self.encoding.upper()))
        if self.has_mark:
            parts.append("byte order mark")
        if self.has_windows_line_ends:
            parts.append("Windows line ends")
        if self.compression:
            parts.append(f"packed with {self.compression}")
        return ", ".join(parts)


def data_suffix(path: Path) -> str:
    """The part of a name that tells the kind of file, with that of a packed one.

    >>> data_suffix(Path("my.train.jsonl.gz"))
    '.jsonl.gz'
    """
    last = path.suffix.lower()
    if last in COMPRESSED_SUFFIXES:
        return Path(path.stem).suffix.lower() + last
    return last


def _plain_suffix(path: Path) -> str:
    suffix = data_suffix(path)
    return next(
        (suffix.removesuffix(packed) for packed in COMPRESSED_SUFFIXES if suffix.endswith(packed)), suffix
    )


def recognise(path: Path, options: ReadOptions | None = None) -> FileForm | None:
    """The form of a file, None where it cannot be opened; reading it then says why."""
    if path.is_dir() and is_dataset_folder(path):
        return FileForm(container="datasets folder", rows=_row_form(read_folder(path), options))
    if file_fault(path) is not None:
        return None
    try:
        compression = compression_of(path)
        with open_bytes(path) as stream:
            head = stream.read(_HEAD_BYTES)
    except (DataError, *DAMAGE, OSError):
        return None
    if head.startswith((b"PAR1", b"ARROW1")) or _plain_suffix(path) in COLUMN_SUFFIXES:
        container: Container = "Parquet" if head.startswith(b"PAR1") else "Arrow"
        return FileForm(container=container, rows=_row_form(read_columns(path), options))
    encoding, mark = encoding_of(head)
    text = head[mark:].decode(encoding, errors="replace")
    container = _container(text, _plain_suffix(path))
    return FileForm(
        container=container,
        rows=_row_form(_records(path, container), options),
        compression=compression,
        encoding=encoding,
        has_mark=mark > 0,
        has_windows_line_ends="\r\n" in text,
        columns=tuple(text.split("\n", 1)[0].strip().split(delimiter_of(text.split("\n", 1)[0])))
        if container in ("CSV", "TSV")
        else (),
    )


def read_file(path: Path) -> Iterator[Record | tuple[int, str] | Finding]:
    """Everything of a file in order: rows, documents as (line, text), and findings."""
    if path.is_dir() and is_dataset_folder(path):
        yield from read_folder(path)
        return
    if (fault := file_fault(path)) is not None:
        yield fault
        return
    try:
        with open_bytes(path) as stream:
            head = stream.read(_HEAD_BYTES)
    except (DataError, *DAMAGE, OSError) as error:
        yield unreadable(path, error)
        return
    if head.startswith((b"PAR1", b"ARROW1")) or _plain_suffix(path) in COLUMN_SUFFIXES:
        yield from read_columns(path)
        return
    encoding, mark = encoding_of(head)
    container = _container(head[mark:].decode(encoding, errors="replace"), _plain_suffix(path))
    if container in ("plain text", "Markdown"):
        yield from read_documents(path)
    else:
        yield from _records(path, container)


def _container(text: str, suffix: str) -> Container:
    if suffix in TABLE_SUFFIXES:
        return "TSV" if delimiter_of(text.split("\n", 1)[0]) == "\t" else "CSV"
    if suffix in MARKDOWN_SUFFIXES:
        return "Markdown"
    first = text.lstrip()[:1]
    is_json_name = suffix in JSON_SUFFIXES
    if suffix in PLAIN_SUFFIXES and not (first == "{" and _is_json_row(text)):
        return "plain text"
    if first == "[" and not _is_list_of_messages(text):
        return "JSON array"
    if first == "{" or is_json_name or suffix:
        return "JSON Lines"
    return "plain text"


def _is_json_row(text: str) -> bool:
    try:
        return isinstance(json.loads(text.strip().split("\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False


def _is_list_of_messages(text: str) -> bool:
    """Whether the first line is a whole conversation: a list of turns, one list on each line."""
    try:
        value = json.loads(text.strip().split("\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(turn, dict) and "role" in turn for turn in value)
    )


def _records(path: Path, container: Container) -> Iterator[Record | Finding]:
    if container in ("CSV", "TSV"):
        return read_table(path)
    return read_array(path) if container == "JSON array" else read_records(path)


def _row_form(items: Iterator[Record | Finding], options: ReadOptions | None) -> str:
    """The commonest form among the first rows, "" where there is no row."""
    names = Counter(
        form_name(item.value, options or ReadOptions())
        for item in islice(items, NUM_ROWS_LOOKED_AT)
        if isinstance(item, Record)
    )
    return names.most_common(1)[0][0] if names else ""
