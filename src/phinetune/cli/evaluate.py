"""`phinetune evaluate`: measure a finished run again, on its test set or on another file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from phinetune.cli import console
from phinetune.cli.adapter_place import ForceBase

NUM_ANSWERS_SHOWN = 3


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="Examples to measure on; the run's test set when left out.", show_default=False),
    ] = None,
    force_base: ForceBase = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
) -> None:
    """Compare base and adapter on the test set, or on another file."""
    from phinetune import api
    from phinetune.cli.progress import CountBar

    console.note(f"plan     base and adapter answer {data or 'the test set of the run'}", style="dim")
    with CountBar(console.err(), "measure") as bar:
        comparison = api.evaluate(run, data, on_progress=bar.show, force_base=force_base)
    answers = [dataclasses.asdict(answer) for answer in comparison.answers]
    for text in comparison.notes:
        console.note(f"note     {text}", style="dim")
    if json:
        console.print_json({"evaluation": comparison.evaluation(), "answers": answers})
        return
    from phinetune.cli.comparison_view import answers_view, comparison_table
    from phinetune.cli.figures import headline

    console.say(comparison_table(comparison.evaluation()))
    console.say(*answers_view(answers[:NUM_ANSWERS_SHOWN]))
    console.say(headline(comparison.evaluation()))
    is_classifier = "accuracy" in comparison.evaluation()["difference"]
    console.next_commands(f'phinetune classify {run} "..."' if is_classifier else f"phinetune chat {run}")
