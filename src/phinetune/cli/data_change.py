"""`phinetune data clean | split | convert | sample | merge`: new files from old ones, never over them."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from phinetune.base.errors import SettingsError
from phinetune.cli import console
from phinetune.cli.data_options import (
    Columns,
    Keep,
    Model,
    Seqlen,
    Tools,
    filter_judge,
    read_options,
    token_counter,
)

if TYPE_CHECKING:
    from phinetune.data.changing.versions import CleanResult

File = Annotated[Path, typer.Argument(help="Data file.", show_default=False)]
Seed = Annotated[int, typer.Option(help="The same seed draws the same rows.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def clean(
    file: File,
    to: Annotated[
        Path | None,
        typer.Option(help="New folder; beside FILE with -clean if not given.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Apply this rule and no other; again for more.", show_default=False),
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="Apply this rule too; again for more.", show_default=False)
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave this rule out; again for more.", show_default=False)
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="A test set: leave out rows that leak from it.", show_default=False)
    ] = None,
    columns: Columns = None,
    keep: Keep = None,
    tools: Tools = None,
    model: Model = None,
    seqlen: Seqlen = 1024,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    json: Json = False,
) -> None:
    """Repair rows and leave out what harms; a new folder with the rows, every change and a manifest."""
    from phinetune.data.changing.cleaning import CleanOptions, chosen_rules
    from phinetune.data.changing.versions import clean_file

    rules = chosen_rules(only or (), rule or (), without or ())
    if "over_long" in rules and model is None:
        raise SettingsError("over_long counts tokens", where="--rule over_long", do="say whose: --model demo")
    options = CleanOptions(
        rules=rules,
        read=read_options(columns, keep, tools),
        test_file=test,
        count_tokens=token_counter(model, seqlen) if model else None,
        judge=filter_judge() if "toxic" in rules else None,
    )
    folder = to or file.with_name(file.name.split(".")[0] + "-clean")
    result = clean_file(file, folder, options, is_dry=dry_run)
    if json:
        console.print_json(
            dataclasses.asdict(result) | {"folder": _path(result.folder), "file": _path(result.file)}
        )
        return
    _show_cleaning(result)
    if result.file:
        console.next_commands(f"phinetune data check {shlex.quote(str(result.file))}")


def _path(path: Path | None) -> str | None:
    return str(path) if path else None


def _show_cleaning(result: CleanResult) -> None:
    if not result.changes:
        console.say(f"nothing to clean: all {result.num_read:,} rows stay as they are, nothing is written")
        return
    console.say(f"{result.num_read:,} rows read, {result.num_kept:,} kept")
    for title, counts in (("left out", result.dropped), ("repaired", result.changed)):
        for name, count in counts.items():
            console.say(f"  {title:9} {count:>8,}  {name}")
    for name, count in result.redacted.items():
        console.say(f"  {'replaced':9} {count:>8,}  different values by [{name}_1] and so on")
    if result.unused_keys:
        console.say(f"  keys that are not used and not carried over: {', '.join(result.unused_keys)}")
    if result.folder:
        console.say(Text(f"written to {result.folder}; changes.md shows what was changed", style="bold"))
    else:
        console.say("a dry run: nothing is written")


def split(
    file: File,
    to: Annotated[Path, typer.Option(help="New folder for train.jsonl, test.jsonl and the recipe.")] = Path(
        "dataset"
    ),
    test: Annotated[float, typer.Option(help="Share of the rows for the test set.")] = 0.2,
    valid: Annotated[
        float | None, typer.Option(help="Share for a second held-out set, valid.jsonl.", show_default=False)
    ] = None,
    seed: Seed = 0,
    columns: Columns = None,
    keep: Keep = None,
    tools: Tools = None,
    json: Json = False,
) -> None:
    """Split by a hash of the prompt: rows nearly alike stay together, classes keep their shares."""
    from phinetune.data.changing.splitting import split_file

    shares = {"test": test} | ({"valid": valid} if valid is not None else {})
    result = split_file(file, to, shares, seed=seed, options=read_options(columns, keep, tools))
    if json:
        console.print_json(dataclasses.asdict(result) | {"folder": str(result.folder)})
        return
    total = sum(result.rows.values())
    for name, count in result.rows.items():
        classes = ", ".join(f"{label} {number:,}" for label, number in list(result.classes[name].items())[:8])
        shown = f"   {classes}" if classes else ""
        console.say(f"{name + '.jsonl':12} {count:>8,} rows  {count / total:6.1%}{shown}")
    if result.num_groups_kept_together:
        console.say(f"{result.num_groups_kept_together:,} groups of rows that are alike were kept together")
    folder = shlex.quote(str(result.folder))
    console.next_commands(
        f"phinetune new my-project --model demo --train {folder}/train.jsonl --test {folder}/test.jsonl"
    )


def convert(
    file: Annotated[Path, typer.Argument(help="Data file, or a datasets folder.", show_default=False)],
    to: Annotated[
        Path, typer.Option(help="New file: .jsonl, .json, .csv, .tsv, .parquet, .txt or .md.")
    ] = Path("train.jsonl"),
    form: Annotated[str, typer.Option(help="messages, sharegpt, alpaca or pairs.")] = "messages",
    columns: Columns = None,
    keep: Keep = None,
    tools: Tools = None,
) -> None:
    """Write a file in another form; every row must be sound, none is lost."""
    from phinetune.data.changing.splitting import convert_file
    from phinetune.data.formats.recognise import recognise

    options = read_options(columns, keep, tools)
    count = convert_file(file, to, form=form, options=options)
    console.say(f"{recognise(file, options)}", f"{count:,} rows written to {to}")
    console.next_commands(f"phinetune data check {shlex.quote(str(to))}")


def sample(
    file: File,
    to: Annotated[Path, typer.Option(help="New file.", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 100,
    balance: Annotated[bool, typer.Option("--balance", help="As many rows of each class.")] = False,
    seed: Seed = 0,
    columns: Columns = None,
) -> None:
    """Draw rows by the seed, in the order of the file."""
    from phinetune.data.changing.splitting import sample_file

    options = read_options(columns, None, None)
    count = sample_file(file, to, rows, seed=seed, is_balanced=balance, options=options)
    console.say(f"{count:,} rows written to {to}")
    console.next_commands(f"phinetune data check {shlex.quote(str(to))}")


def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Data files.", show_default=False)],
    to: Annotated[Path, typer.Option(help="New file.", show_default=False)],
) -> None:
    """Put files one after another; rows that stood before are left out and counted."""
    from phinetune.data.changing.splitting import merge_files

    for name, counts in merge_files(files, to).items():
        console.say(f"{counts['rows']:>8,} rows, {counts['left_out']:>6,} left out as duplicates  {name}")
    console.say(f"written to {to}")
    console.next_commands(f"phinetune data check {shlex.quote(str(to))}")


COMMANDS = (clean, split, convert, sample, merge)
