"""`phinetune quickstart`: the whole road in one command, on the bundled model and data."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from phinetune.cli import console

EXPLANATION = (
    "This trains a small bundled model to turn customer messages into JSON tickets, a task it has never "
    "seen. Then both models, before and after, answer test messages that were kept apart."
)


def quickstart(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder for the project.", show_default=False)
    ],
    json: Annotated[bool, typer.Option("--json", help="Print summary.json, nothing else.")] = False,
) -> None:
    """Make a project from bundled data, train it and show the proof. Takes a few minutes."""
    from phinetune.base.errors import UserError
    from phinetune.cli.train import show_run
    from phinetune.runs.project import create_project, is_project, is_taken
    from phinetune.training.settings import QUICKSTART, TrainingSettings

    console.note(EXPLANATION + "\n")
    if is_project(folder):
        console.note(f"'{folder}' is a project already: this is a further run in it.\n")
    elif is_taken(folder):
        raise UserError(
            f"'{folder}' already holds something else",
            where=str(folder),
            why="quickstart makes a project, or adds a run to one",
            do="name a new or empty folder",
        )
    else:
        with resources.as_file(resources.files("phinetune.data") / "demo") as demo:
            create_project(
                folder, TrainingSettings(**QUICKSTART), train=demo / "train.json", test=demo / "test.json"
            )
    show_run(folder, run_name=None, overrides={}, json=json)
