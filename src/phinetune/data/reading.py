"""Read data files as checked examples, and find the files that a data set's name stands for.

`.txt`, `.tokens` and `.raw` hold plain text (see `documents`); every other file holds JSON objects, one
after another. Rows stream: one is in memory at a time. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phinetune.base.errors import DataError, nearest
from phinetune.data.conversation import Example
from phinetune.data.documents import read_documents
from phinetune.data.findings import Finding, refusal
from phinetune.data.records import read_records
from phinetune.data.rows import RowExaminer
from phinetune.data.wikitext2 import PLAIN_SUFFIXES, WIKITEXT2, find_wikitext2

SUFFIXES = (".json", ".jsonl", *PLAIN_SUFFIXES)
MAX_FINDINGS_KEPT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFiles:
    """The files of a data set; `test` is None where there is none."""

    train: Path
    test: Path | None


def read_examples(path: Path) -> Iterator[Example | Finding]:
    """Each example in file order, and a Finding for each fault; warnings come before their example.

    A file without any row gives one Finding with line 0.
    """
    examiner = RowExaminer(str(path))
    is_plain = path.suffix.lower() in PLAIN_SUFFIXES
    has_row = False
    for item in read_documents(path) if is_plain else read_records(path):
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


def load_examples(path: Path, *, limit: int | None = None) -> list[Example]:
    """The examples of a file, or the first `limit` of them; rows after these are not read.

    Raises DataError with all findings when there is an error in what was read. Warnings do not stop.
    """
    return list(sound_examples(path, limit=limit))


def sound_examples(path: Path, *, limit: int | None = None) -> Iterator[Example]:
    """The same one by one, for files that do not fit into memory; the error comes at the end.

    After the first fault no more examples come, but the rest is read for further ones.
    """
    errors: list[Finding] = []
    num_errors = num_examples = 0
    for item in read_examples(path):
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

    A folder holds `train` and, if wanted, `test`, ending in .json, .jsonl or .txt. `wikitext2` stands
    for WikiText-2 (see `find_wikitext2`). Raises DataError.
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
