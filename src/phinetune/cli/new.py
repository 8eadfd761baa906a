"""`phinetune new`: make a project from two data files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phinetune.cli import console


def new(
    project: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(help="Base model: demo, a local folder, or a Hugging Face name.", show_default=False),
    ],
    train: Annotated[Path, typer.Option(help="Examples to train on.", show_default=False)],
    test: Annotated[
        Path | None,
        typer.Option(
            help="Other examples, to judge the result by; a fifth of the first if not given.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Settings to begin with: default, phi-silica, aion or phi-cookbook.")
    ] = "default",
) -> None:
    """Make a project: lora/lora.yaml with every setting explained, and copies of the data."""
    from phinetune.runs.project import SETTINGS_FILE, create_project
    from phinetune.training.presets import preset as find_preset
    from phinetune.training.settings import TrainingSettings

    local = Path(model)
    chosen = find_preset(preset)
    settings = TrainingSettings(
        **chosen.values,
        model=str(local.resolve()) if local.is_dir() else model,
        finetune_dataset="dataset",
    )
    made = create_project(project, settings, train=train, test=test)
    console.say(
        f"project   {made.folder}",
        f"settings  {made.folder / SETTINGS_FILE}",
        f"preset    {preset}: {chosen.meaning}",
        f"data      {made.num_train:,} training and {made.num_test:,} test examples, "
        f"{'copied to' if test else 'split from one file into'} {made.folder / 'dataset'}",
    )
    console.next_commands(
        f"phinetune data preview {made.train} --model {settings.model}",
        f"phinetune train {made.folder}",
    )
