"""Rows of Parquet and Arrow files, and of Hugging Face `datasets` folders on this machine. Needs pyarrow.

A row's line is its number, counted from 1. Knows nothing of messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phinetune.data.findings import Finding
from phinetune.data.formats.json_lines import Record

BATCH_ROWS = 256
COLUMN_SUFFIXES = (".parquet", ".arrow")
_FOLDER_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")


def read_columns(path: Path) -> Iterator[Record | Finding]:
    """Each row of one file as a dict by column."""
    yield from _read([path], str(path))


def is_dataset_folder(folder: Path) -> bool:
    """Whether a folder is what `datasets` saves, or holds Parquet files."""
    return any((folder / name).is_file() for name in _FOLDER_FILES) or bool(_files(folder))


def splits_of(folder: Path) -> list[str]:
    """The names of the parts that `DatasetDict.save_to_disk` wrote, or [].

    Any that could lead out of the folder are left out.
    """
    try:
        names = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if not isinstance(names, list):
        return []
    return [
        name
        for name in names
        if isinstance(name, str) and Path(name).name == name and (folder / name).is_dir()
    ]


def read_folder(folder: Path) -> Iterator[Record | Finding]:
    """Each row of a folder; of its training part where there are several."""
    part = folder / "train" if "train" in splits_of(folder) else folder
    files = _files(part)
    train = [file for file in files if file.name.startswith("train")]
    if not files:
        names = ", ".join(splits_of(folder))
        fix = f"name one of its parts: {names}" if names else "name the file that holds the rows"
        message = "the folder holds no .arrow or .parquet files"
        yield Finding(rule="is_folder", severity="error", file=str(folder), line=0, message=message, fix=fix)
        return
    yield from _read(train or files, str(folder))


def _files(folder: Path) -> list[Path]:
    for place in (folder, folder / "data"):
        files = sorted(path for path in place.glob("*") if path.suffix in COLUMN_SUFFIXES and path.is_file())
        if files:
            return files
    return []


def _read(files: list[Path], name: str) -> Iterator[Record | Finding]:
    try:
        import pyarrow
    except ImportError:
        fix = "pip install 'phinetune[data]' (pyarrow), or save the rows as JSON Lines"
        message = "Parquet and Arrow files need pyarrow, which is not installed"
        yield Finding(rule="unreadable", severity="error", file=name, line=0, message=message, fix=fix)
        return
    number = 0
    for file in files:
        try:
            for batch in _batches(file):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(number, value)
        except (pyarrow.ArrowException, OSError) as error:
            message = f"{file.name} cannot be read: {str(error).splitlines()[0]}"
            fix = "write it anew, or save the rows as JSON Lines"
            yield Finding(rule="damaged", severity="error", file=name, line=number, message=message, fix=fix)


def _batches(file: Path) -> Iterator[Any]:
    """Record batches of at most `BATCH_ROWS` rows."""
    if file.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(file) as opened:
            yield from opened.iter_batches(batch_size=BATCH_ROWS)
        return
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        head = source.read(6)
        source.seek(0)
        if head == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches: Iterator[Any] = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)
