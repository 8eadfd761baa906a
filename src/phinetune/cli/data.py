"""`phinetune data check` and `data preview`; the other commands on data are in their own modules."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phinetune.base.errors import SettingsError, nearest
from phinetune.cli import console, data_change, data_look, data_write
from phinetune.cli.data_options import (
    Columns,
    Keep,
    Model,
    Seqlen,
    Tools,
    base_loss,
    model_folder,
    read_options,
    reading_flags,
    token_counter,
    told_check,
    toxic_options,
)

if TYPE_CHECKING:
    from phinetune.data.checking import CheckReport
    from phinetune.text.render import Renderer

LOSS_ON = ("assistant", "all")

data_app = typer.Typer(
    help="Check, clean and prepare data files, and see what a model would be trained on.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@data_app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Data files.", show_default=False)],
    columns: Columns = None,
    keep: Keep = None,
    tools: Tools = None,
    test: Annotated[
        Path | None, typer.Option(help="A test set: name the rows that leak from it.", show_default=False)
    ] = None,
    model: Model = None,
    seqlen: Seqlen = 1024,
    toxic: Annotated[
        str, typer.Option(help="some, all or none: how many rows the content filter judges.")
    ] = "some",
    duplicates: Annotated[
        bool, typer.Option(help="Look for rows alike; without, memory does not grow with the rows.")
    ] = True,
    noise: Annotated[
        str | None,
        typer.Option(help="Rank doubtful rows by the loss of this base: demo or a name.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Say what files hold and everything that is wrong, with its line and the fix; exit code 2 on errors."""
    from phinetune.data.checking import CheckOptions

    judge, max_judged = toxic_options(toxic)
    options = CheckOptions(
        read=read_options(columns, keep, tools),
        test_file=test,
        with_duplicates=duplicates,
        count_tokens=token_counter(model, seqlen) if model else None,
        judge=judge,
        max_judged=max_judged,
        loss_of=base_loss(noise, seqlen) if noise else None,
    )
    reports = [told_check(file, options) for file in files]
    is_sound = all(report.is_sound for report in reports)
    if json:
        console.print_json({"is_sound": is_sound, "files": [report_record(report) for report in reports]})
    else:
        from phinetune.cli.data_report import show_report

        for report in reports:
            show_report(report)
        _what_next(files, reports, reading_flags(columns, keep, tools), test)
    console.stop(console.DONE if is_sound else console.USER_INPUT)


def _what_next(files: list[Path], reports: list[CheckReport], flags: str, test: Path | None) -> None:
    """The road from here: clean what can be cleaned, bring it into a form to train on, train."""
    from phinetune.data.changing.cleaning import DEFAULT_RULES

    leaks = f" --test {shlex.quote(str(test))}" if test else ""
    is_sound = all(report.is_sound for report in reports)
    commands = []
    for report in reports:
        if report.num_examples and (report.num_errors or not report.counts.keys().isdisjoint(DEFAULT_RULES)):
            commands.append(f"phinetune data clean {shlex.quote(report.file)}{flags}{leaks}")
    first = shlex.quote(str(files[0]))
    if is_sound and flags:
        commands.append(f"phinetune data convert {first}{flags} --to train.jsonl")
    elif is_sound:
        shown_test = shlex.quote(str(test)) if test else "..."
        commands.append(f"phinetune data preview {first} --model demo")
        commands.append(f"phinetune new my-project --model demo --train {first} --test {shown_test}")
    elif there := [report.file for report in reports if "missing" not in report.counts]:
        commands.append(f"phinetune data check {shlex.join(there)}{flags}{leaks}")
    if commands:
        console.next_commands(*commands[-4:])


@data_app.command()
def preview(
    file: Annotated[Path, typer.Argument(help="Data file.", show_default=False)],
    model: Annotated[str, typer.Option(help="demo, a model folder, or a Hugging Face name.")] = "demo",
    rows: Annotated[int, typer.Option(min=1, help="How many examples, from the first.")] = 3,
    seqlen: Annotated[
        int | None,
        typer.Option(min=1, help="Strike through what lies beyond this many tokens.", show_default=False),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="List each token with its id.")] = False,
    system_prompt: Annotated[
        str | None, typer.Option(help="Replaces the system message of the data.", show_default=False)
    ] = None,
    loss_on: Annotated[str, typer.Option(help="assistant or all: which tokens are trained.")] = "assistant",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Show the tokens of the first examples: which are trained, which are control tokens, which are cut."""
    from phinetune.cli.data_view import preview_rows, show_preview
    from phinetune.data.reading import load_examples
    from phinetune.text.render import load_renderer

    if loss_on not in LOSS_ON:
        do = f"did you mean {near}?" if (near := nearest(loss_on, LOSS_ON)) else "write assistant or all"
        raise SettingsError(f"loss_on cannot be '{loss_on}'", where="--loss-on", do=do)
    examples = load_examples(file, limit=rows)
    renderer = load_renderer(model_folder(model))
    rendered = renderer.examples(
        examples, system_prompt=system_prompt, loss_on="all" if loss_on == "all" else "assistant"
    )
    shown = preview_rows(renderer, rendered, seqlen=seqlen)
    if json:
        records = [row.record() for row in shown]
        console.print_json({**_model_record(model, renderer), "seqlen": seqlen, "rows": records})
        return
    show_preview(shown, seqlen=seqlen, with_ids=ids)
    options = shlex.join(["--train", str(file), "--model", model])
    console.next_commands(f"phinetune new my-project {options} --test ...")


def _model_record(name: str, renderer: Renderer) -> dict[str, Any]:
    template = renderer.template.name if renderer.template is not None else None
    stop = sorted(renderer.stop_ids)
    return {"model": name, "template": template, "stop_ids": stop, "tokenizer": renderer.tokenizer.sha256}


def report_record(report: CheckReport) -> dict[str, Any]:
    """A report as JSON; lists of a number for each row are left to `data stats`."""
    record = {
        entry.name: getattr(report, entry.name)
        for entry in dataclasses.fields(report)
        if entry.name not in ("findings", "lengths", "tokens")
    }
    tokens = report.tokens
    counted = (
        {"num_tokens": tokens.num_tokens, "num_trained": tokens.num_trained, "num_lost": tokens.num_lost}
        if tokens
        else None
    )
    findings = [dataclasses.asdict(finding) for finding in report.findings]
    clusters = dataclasses.asdict(report.clusters)
    return {
        **record,
        "clusters": clusters,
        "tokens": counted,
        "is_sound": report.is_sound,
        "findings": findings,
    }


_others: list[Callable[..., None]] = [*data_look.COMMANDS, *data_change.COMMANDS, *data_write.COMMANDS]
for _command in _others:
    data_app.command(_command.__name__.replace("_", "-"))(_command)
