"""Read data files as checked examples, and find the files that a data set's name stands for.

What a file is shows in its content (see `formats.recognise`). Rows stream: one is in memory at a time. Knows
nothing of tokens.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phinetune.base.errors import DataError, nearest
from phinetune.data.conversation import Example
from phinetune.data.findings import Finding, refusal
from phinetune.data.formats.columns import is_dataset_folder
from phinetune.data.formats.lines import file_fault
from phinetune.data.formats.recognise import SUFFIXES as PLAIN_SUFFIXES
from phinetune.data.formats.recognise import read_file
from phinetune.data.formats.row_forms import ReadOptions
from phinetune.data.formats.streams import COMPRESSED_SUFFIXES
from phinetune.data.rows import RowExaminer
from phinetune.data.wikitext2 import WIKITEXT2, find_wikitext2

# What a data file may end in, packed or not.
SUFFIXES = (*PLAIN_SUFFIXES, *(kind + packed for kind in PLAIN_SUFFIXES for packed in COMPRESSED_SUFFIXES))
MAX_FINDINGS_KEPT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFiles:
    """The files of a data set; `test` is None where there is none."""

    train: Path
    test: Path | None


def read_examples(path: Path, options: ReadOptions | None = None) -> Iterator[Example | Finding]:
    """Each example in file order, and a Finding for each fault; warnings come before their example.

    A file without any row gives one Finding with line 0.
    """
    examiner = RowExaminer(str(path), options)
    has_row = False
    for item in read_file(path):
        has_row = True
        if isinstance(item, Finding):
            yield item
            continue
        if isinstance(item, tuple):
            example, findings = examiner.examine_text(item[1], item[0])
        else:
            example, findings = examiner.examine(item.value, item.line)
        yield from findings
        if example is not None:
            yield example
    if not has_row:
        yield Finding(
            rule="empty",
            severity="error",
            file=str(path),
            line=0,
            message="the file holds nothing but blank lines",
            fix="put at least one example into it",
        )


def require_file(path: Path) -> None:
    """Raises `DataError` where there is nothing to read: a missing or empty file, a folder."""
    if is_dataset_folder(path) or (fault := file_fault(path)) is None:
        return
    raise DataError(fault.message, where=str(path), do=fault.fix)


def sound_rows(path: Path, options: ReadOptions | None = None) -> Iterator[Example]:
    """The examples of a file without those that cannot be read.

    Raises `DataError` where the file is missing, or at its end where it held no example.
    """
    require_file(path)
    num_rows = 0
    for item in read_examples(path, options):
        if not isinstance(item, Finding):
            num_rows += 1
            yield item
    if not num_rows:
        do = f"see why: phinetune data check {shlex.quote(str(path))}"
        raise DataError("no row of the file can be read", where=str(path), do=do)


def load_examples(
    path: Path, *, limit: int | None = None, options: ReadOptions | None = None
) -> list[Example]:
    """The examples of a file, or the first `limit` of them; rows after these are not read.

    Raises DataError with all findings when there is an error in what was read. Warnings do not stop.
    """
    return list(sound_examples(path, limit=limit, options=options))


def sound_examples(
    path: Path, *, limit: int | None = None, options: ReadOptions | None = None
) -> Iterator[Example]:
    """The same one by one, for files that do not fit into memory; the error comes at the end.

    After the first fault no more examples come, but the rest is read for further ones.
    """
    errors: list[Finding] = []
    num_errors = num_examples = 0
    for item in read_examples(path, options):
        if not isinstance(item, Finding):
            num_examples += 1
            if not num_errors:
                yield item
        elif item.is_error:
            num_errors += 1
            if len(errors) < MAX_FINDINGS_KEPT:
                errors.append(item)
        if limit is not None and num_examples >= limit:
            break
    if num_errors:
        faults = "1 fault" if num_errors == 1 else f"{num_errors:,} faults"
        do = f"correct the file, then run: phinetune data check {path}"
        raise refusal(f"{path} has {faults}", errors, do=do, num_faults=num_errors)


def resolve_dataset(name: str, root: Path) -> DatasetFiles:
    """The files of a data set named by a folder, by a file, or as `wikitext2`; names are relative to `root`.

    A folder holds `train` and, if wanted, `test`, in any form that is read: .jsonl, .json, .csv, .parquet,
    .txt, .jsonl.gz and so on. `wikitext2` stands for WikiText-2 (see `find_wikitext2`). Raises DataError.
    """
    path = root / name
    if path.is_file():
        return DatasetFiles(train=path, test=None)
    if path.is_dir():
        return _in_folder(path)
    if name == WIKITEXT2:
        train, test = find_wikitext2()
        return DatasetFiles(train=train, test=test)
    known = [WIKITEXT2] + [entry.name for entry in root.iterdir()] if root.is_dir() else [WIKITEXT2]
    near = nearest(name, known)
    do = f"did you mean {near}?" if near else "name a folder with train.json and test.json, or a file"
    raise DataError(f"no data set {name!r}", where=str(root), do=do)


def _in_folder(folder: Path) -> DatasetFiles:
    train = _only(folder, "train")
    if train is None and is_dataset_folder(folder):
        raise DataError(
            "a folder saved by datasets is converted before it is trained on",
            where=str(folder),
            do=f"phinetune data convert {folder} --to train.jsonl",
        )
    if train is None:
        names = sorted(entry.name for entry in folder.iterdir())
        near = nearest("train.json", [name for name in names if not name.startswith("test.")])
        raise DataError(
            "the folder has no train.json",
            where=str(folder),
            why=f"it holds {', '.join(names[:8]) or 'nothing'}",
            do=f"rename {near} to train.json"
            if near
            else "put train.json there, and test.json if there is one",
        )
    return DatasetFiles(train=train, test=_only(folder, "test"))


def _only(folder: Path, stem: str) -> Path | None:
    found = [folder / (stem + suffix) for suffix in SUFFIXES if (folder / (stem + suffix)).is_file()]
    if len(found) > 1:
        raise DataError(
            f"two files could be the {stem} set",
            where=str(folder),
            why=" and ".join(path.name for path in found),
            do="keep one of them in the folder, or name the file itself",
        )
    return found[0] if found else None
