"""Split, sample and merge files: who goes where follows from the seed and the prompt, never from the order.

Rows that are nearly alike, or ask the same, stay on one side; classes keep their shares.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import shlex
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phinetune.base.errors import DataError, SettingsError
from phinetune.base.files import committed_dir
from phinetune.data.changing.writing import (
    line_of,
    refuse_existing,
    row_of,
    source_record,
    write_file,
    write_recipe,
)
from phinetune.data.conversation import Example
from phinetune.data.findings import Finding, refusal
from phinetune.data.formats.row_forms import ReadOptions
from phinetune.data.groups import Groups
from phinetune.data.near import NearIndex
from phinetune.data.reading import read_examples, require_file
from phinetune.data.rules.balance import ClassCheck, label_key
from phinetune.data.rules.base import RowView
from phinetune.data.rules.duplicates import key_of, loosened, row_key, take_in

AUTOMATIC_TEST_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitResult:
    """Rows by part; `num_groups_kept_together` counts groups of rows that are alike."""

    folder: Path
    rows: Mapping[str, int]
    classes: Mapping[str, Mapping[str, int]]
    num_groups_kept_together: int


def sound_examples(path: Path, options: ReadOptions | None = None) -> Iterator[Example]:
    """Every example of a file; raises `DataError` at the first fault, for nothing may be lost unseen."""
    require_file(path)
    for item in read_examples(path, options):
        if not isinstance(item, Finding):
            yield item
        elif item.is_error:
            name = shlex.quote(str(path))
            do = f"see all faults: phinetune data check {name}; leave them out: phinetune data clean {name}"
            raise refusal(f"{path} has a row that cannot be read", [item], do=do)


def split_file(
    path: Path, folder: Path, shares: Mapping[str, float], *, seed: int, options: ReadOptions | None = None
) -> SplitResult:
    """Write `train.jsonl` and a file for each of `shares` (parts of 1) into a new folder.

    Raises `DataError` where a row cannot be read or a part would be empty, `UserError` where `folder` exists.
    """
    if not shares or min(shares.values()) <= 0 or sum(shares.values()) >= 1:
        raise SettingsError(
            "the shares leave nothing to train on",
            where="--test, --valid",
            do="choose shares above 0 and below 1 together",
        )
    refuse_existing(folder)
    rows = _Rows(path, options)
    part_of = rows.parts(shares, seed)
    names = ["train", *shares]
    counts = {name: part_of.count(number) for number, name in enumerate(names)}
    if empty := [name for name, count in counts.items() if not count]:
        raise DataError(
            f"the part '{empty[0]}' would be empty",
            where=str(path),
            why=f"there are {len(part_of):,} rows in {rows.num_groups:,} groups that stay together",
            do="choose a larger share, or add rows",
        )
    recipe: dict[str, Any] = {
        "made_by": "phinetune data split",
        "input": source_record(path),
        "seed": seed,
        "shares": dict(shares),
        "rows": counts,
        "groups_kept_together": rows.num_joined,
    }
    with committed_dir(folder) as making:
        _write_parts(making, names, part_of, sound_examples(path, options))
        (making / "recipe.json").write_text(json.dumps(recipe, indent=1, ensure_ascii=False) + "\n", "utf-8")
    classes = {name: rows.classes_of(part_of, number) for number, name in enumerate(names)}
    return SplitResult(folder=folder, rows=counts, classes=classes, num_groups_kept_together=rows.num_joined)


def _write_parts(
    folder: Path, names: Sequence[str], part_of: Sequence[int], examples: Iterable[Example]
) -> None:
    files = [(folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") for name in names]
    try:
        for part, example in zip(part_of, examples, strict=True):
            files[part].write(line_of(row_of(example)))
    finally:
        for file in files:
            file.close()


class _Rows:
    """What decides where rows go: groups of those alike, classes, and a hash of each group."""

    def __init__(self, path: Path, options: ReadOptions | None) -> None:
        keys, prompts, labels = array("Q"), array("Q"), array("Q")
        check = ClassCheck(str(path))
        with NearIndex() as index:
            for number, example in enumerate(sound_examples(path, options)):
                row = RowView(example, number)
                list(check.see(row))
                take_in(index, row)
                keys.append(row_key(row))
                # What has no prompt is told apart by its text alone.
                prompts.append(key_of(loosened(row.prompt)) if row.prompt.strip() else keys[-1])
                labels.append(key_of(label_key(row.answer)))
            groups = Groups(len(keys))
            for one, other in index.pairs():
                groups.join(one, other)
        first: dict[int, int] = {}
        for key in (keys, prompts):
            for number, value in enumerate(key):
                groups.join(first.setdefault(value, number), number)
        self._groups, self._prompts, self._labels = groups, prompts, labels
        self._names = {key_of(label_key(name)): name for name in check.classes}
        self.num_joined = len(np.unique(groups.others()[0]))
        self.num_groups = sum(groups.first(number) == number for number in range(len(keys)))

    def parts(self, shares: Mapping[str, float], seed: int) -> array[int]:
        """The part of each row: 0 to train on, then those of `shares` in order."""
        members: dict[int, list[int]] = defaultdict(list)
        for number in range(len(self._prompts)):
            members[self._groups.first(number)].append(number)
        strata: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for first, numbers in members.items():
            stratum = self._labels[first] if self._names else 0
            strata[stratum].append((min(hashed(self._prompts[number], seed) for number in numbers), first))
        found = array("b", bytes(len(self._prompts)))
        for groups in strata.values():
            total = sum(len(members[first]) for _, first in groups)
            wanted = [round(share * total) for share in shares.values()]
            part = 0
            for _, first in sorted(groups):
                # A group that overshoots by more than it falls short goes to what follows.
                while part < len(wanted) and wanted[part] * 2 < len(members[first]):
                    part += 1
                if part == len(wanted):
                    break
                for number in members[first]:
                    found[number] = part + 1
                wanted[part] -= len(members[first])
        return found

    def classes_of(self, part_of: Sequence[int], part: int) -> dict[str, int]:
        counts: dict[str, int] = {name: 0 for name in self._names.values()}
        for its_part, label in zip(part_of, self._labels, strict=True):
            if its_part == part and label in self._names:
                counts[self._names[label]] += 1
        return counts


def hashed(key: int, seed: int) -> int:
    """64 bits from a key and a seed."""
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def sample_file(
    path: Path,
    to: Path,
    num_rows: int,
    *,
    seed: int,
    is_balanced: bool = False,
    options: ReadOptions | None = None,
) -> int:
    """Write rows drawn by the seed, in the order of the file; balanced: as many of each class as can be.

    Returns how many were written. Raises `DataError` where answers are no classes to balance.
    """
    refuse_existing(to)
    check = ClassCheck(str(path))
    drawn: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, example in enumerate(sound_examples(path, options)):
        row = RowView(example, number)
        list(check.see(row))
        stratum = key_of(label_key(row.answer)) if is_balanced else 0
        # The smallest hashes win: a heap of the negative ones keeps them.
        entry = (-hashed(row_key(row) ^ number, seed), number)
        (heapq.heappush if len(drawn[stratum]) < num_rows else heapq.heappushpop)(drawn[stratum], entry)
    if is_balanced and not check.classes:
        do = "leave --balance out, or make the answers labels"
        raise DataError("the answers are no classes", where=str(path), do=do)
    each = max(1, num_rows // max(len(drawn), 1)) if is_balanced else num_rows
    chosen = {number for heap in drawn.values() for _, number in heapq.nlargest(each, heap)}
    kept = (example for number, example in enumerate(sound_examples(path, options)) if number in chosen)
    count = write_file(to, kept)
    recipe = {"made_by": "phinetune data sample", "input": source_record(path), "seed": seed, "rows": count}
    write_recipe(to, {**recipe, "is_balanced": is_balanced})
    return count


def merge_files(
    paths: Sequence[Path], to: Path, options: ReadOptions | None = None
) -> dict[str, dict[str, int]]:
    """Write the rows of several files one after another; a row that stood before is left out and counted."""
    refuse_existing(to)
    counts: dict[str, dict[str, int]] = {str(path): {"rows": 0, "left_out": 0} for path in paths}
    seen: set[int] = set()

    def rows() -> Iterator[Example]:
        for path in paths:
            for number, example in enumerate(sound_examples(path, options)):
                key = row_key(RowView(example, number))
                counts[str(path)]["left_out" if key in seen else "rows"] += 1
                if key not in seen:
                    seen.add(key)
                    yield example

    write_file(to, rows())
    inputs = [{**source_record(path), **counts[str(path)]} for path in paths]
    write_recipe(to, {"made_by": "phinetune data merge", "inputs": inputs})
    return counts


def convert_file(path: Path, to: Path, *, form: str = "messages", options: ReadOptions | None = None) -> int:
    """Write a file anew as the kind that `to` ends in; returns how many rows. Every row must be sound."""
    count = write_file(to, sound_examples(path, options), form)
    recipe = {"made_by": "phinetune data convert", "input": source_record(path), "form": form, "rows": count}
    write_recipe(to, recipe)
    return count
