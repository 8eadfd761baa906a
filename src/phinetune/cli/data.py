"""`phinetune data`: check data files, and see what a model would be trained on, token by token."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phinetune.base.errors import SettingsError, nearest
from phinetune.cli import console

if TYPE_CHECKING:
    from phinetune.data.checking import CheckReport
    from phinetune.text.render import Renderer

LOSS_ON = ("assistant", "all")

data_app = typer.Typer(
    help="Check data files, and see what a model would be trained on.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@data_app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Data files.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Count what files hold and report every fault with its line and the fix; exit code 2 on errors."""
    from phinetune.data.checking import check_file

    reports = [check_file(file) for file in files]
    is_sound = all(report.is_sound for report in reports)
    if json:
        console.print_json({"is_sound": is_sound, "files": [_record(report) for report in reports]})
    else:
        from phinetune.cli.data_view import show_report

        for report in reports:
            show_report(report)
        first = shlex.quote(str(files[0]))
        if is_sound:
            console.next_commands(
                f"phinetune data preview {first} --model demo",
                f"phinetune new my-project --model demo --train {first} --test ...",
            )
        else:
            console.next_commands(f"phinetune data check {shlex.join(map(str, files))}")
    console.stop(console.DONE if is_sound else console.USER_INPUT)


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
    renderer = load_renderer(_model_folder(model))
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


def _model_folder(name: str) -> Path:
    """A folder with a tokenizer is enough here; weights are not needed to look at tokens."""
    from phinetune.models.catalog import DEMO, demo_folder, find_model

    if name == DEMO:
        return demo_folder()
    return Path(name) if (Path(name) / "tokenizer.json").is_file() else find_model(name)


def _model_record(name: str, renderer: Renderer) -> dict[str, Any]:
    template = renderer.template.name if renderer.template is not None else None
    stop = sorted(renderer.stop_ids)
    return {"model": name, "template": template, "stop_ids": stop, "tokenizer": renderer.tokenizer.sha256}


def _record(report: CheckReport) -> dict[str, Any]:
    record = dataclasses.asdict(report)
    return {**record, "is_sound": report.is_sound, "findings": list(record["findings"])}
