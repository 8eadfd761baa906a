"""A cleaned file as a new version: a folder with the rows, what was changed, and how it was made.

train-clean/
  train.jsonl     the rows that are left
  changes.jsonl   every change, for machines
  changes.md      the same for people: how many by rule, and the first of each
  recipe.json     input and its hash, rules, counts
  MANIFEST.json   sizes and hashes of these files
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.base.errors import DataError
from phinetune.base.files import committed_dir
from phinetune.data.changing.cleaning import Change, Cleaned, CleanOptions, clean_rows
from phinetune.data.changing.writing import line_of, refuse_existing, row_of, source_record

NUM_SHOWN = 5
CHANGES_FILE = "changes.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanResult:
    """What a cleaning did; `folder` is None where there was nothing to do, or nothing was to be written."""

    folder: Path | None
    file: Path | None
    num_read: int
    num_kept: int
    dropped: dict[str, int]
    changed: dict[str, int]
    redacted: dict[str, int]
    unused_keys: tuple[str, ...]
    changes: tuple[Change, ...]


def clean_file(path: Path, folder: Path, options: CleanOptions, *, is_dry: bool = False) -> CleanResult:
    """Clean `path` into a new `folder`; where nothing is to be changed, nothing is written.

    Raises `UserError` where `folder` exists, and `DataError` where no row would be left.
    """
    if not is_dry:
        refuse_existing(folder)
    cleaned = clean_rows(path, options)
    with cleaned.rows:
        if cleaned.num_read and not cleaned.num_kept:
            rules = ", ".join(rule for rule, _ in cleaned.counts(is_dropped=True).most_common(4))
            do = f"look at it first: phinetune data check {path}"
            raise DataError(f"no row of {path} would be left", why=f"left out by {rules}", do=do)
        file = None
        if cleaned.changes and not is_dry:
            with committed_dir(folder) as making:
                name = _plain_name(path)
                _write(making, name, path, cleaned, options)
            file = folder / name
    return CleanResult(
        folder=folder if file else None,
        file=file,
        num_read=cleaned.num_read,
        num_kept=cleaned.num_kept,
        dropped=dict(cleaned.counts(is_dropped=True).most_common()),
        changed=dict(cleaned.counts(is_dropped=False).most_common()),
        redacted=cleaned.redacted,
        unused_keys=cleaned.unused_keys,
        changes=tuple(cleaned.changes),
    )


def read_changes(file: Path) -> tuple[Change, ...]:
    """What was done to get a cleaned file, from the list beside it; nothing where there is none."""
    path = file.with_name(CHANGES_FILE)
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8") as lines:
        return tuple(Change(**json.loads(line)) for line in lines)


def _plain_name(path: Path) -> str:
    """The name of the cleaned file: what stands before the first dot of the old one, as JSON Lines."""
    stem = path.name
    while (shorter := Path(stem).stem) != stem:
        stem = shorter
    return f"{stem}.jsonl"


def _write(folder: Path, name: str, path: Path, cleaned: Cleaned, options: CleanOptions) -> None:
    with (folder / name).open("w", encoding="utf-8", newline="\n") as file:
        for example in cleaned.examples():
            file.write(line_of(row_of(example)))
    with (folder / CHANGES_FILE).open("w", encoding="utf-8", newline="\n") as file:
        for change in cleaned.changes:
            file.write(
                line_of({key: value for key, value in dataclasses.asdict(change).items() if value != ""})
            )
    (folder / "changes.md").write_text(changes_page(path.name, cleaned), "utf-8", newline="\n")
    recipe: dict[str, Any] = {
        "made_by": "phinetune data clean",
        "input": source_record(path),
        "rules": list(options.rules),
        "num_read": cleaned.num_read,
        "num_kept": cleaned.num_kept,
        "dropped": dict(cleaned.counts(is_dropped=True)),
        "changed": dict(cleaned.counts(is_dropped=False)),
        "redacted_values": cleaned.redacted,
        "keys_not_carried_over": list(cleaned.unused_keys),
    }
    if options.test_file is not None:
        recipe["test_file"] = source_record(options.test_file)
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1, ensure_ascii=False) + "\n", "utf-8")


def changes_page(name: str, cleaned: Cleaned) -> str:
    """What was changed, in Markdown: counts, then the first changes of each rule."""
    out = [
        f"# What was changed in {name}",
        "",
        f"{cleaned.num_read:,} rows were read, {cleaned.num_kept:,} are left.",
    ]
    for title, is_dropped in (("Left out", True), ("Repaired", False)):
        counts = cleaned.counts(is_dropped=is_dropped)
        if counts:
            out += ["", f"## {title}", ""]
            for rule, count in counts.most_common():
                out.append(f"- **{rule}**: {count:,}")
                out += [f"  - {_told(change)}" for change in _first(cleaned.changes, rule, is_dropped)]
    if cleaned.redacted:
        shown = ", ".join(f"{count:,} × {name}" for name, count in cleaned.redacted.items())
        out += [
            "",
            "## Private data",
            "",
            f"Different values replaced: {shown}. The values stand nowhere in this folder.",
        ]
    if cleaned.unused_keys:
        out += ["", f"Keys that are not used and were not carried over: {', '.join(cleaned.unused_keys)}."]
    return "\n".join(out) + "\n"


def _first(changes: Sequence[Change], rule: str, is_dropped: bool) -> list[Change]:
    return [change for change in changes if change.rule == rule and change.is_dropped == is_dropped][
        :NUM_SHOWN
    ]


def _told(change: Change) -> str:
    if change.before or change.after:
        return f"line {change.line}: `{_plain(change.before)}` → `{_plain(change.after)}`"
    return f"line {change.line}: {_plain(change.why)}"


def _plain(text: str) -> str:
    return text.replace("`", "'").replace("\n", " ")
