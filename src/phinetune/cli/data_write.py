"""`phinetune data augment | system-prompt`: help to write data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from phinetune.base.errors import SettingsError, nearest
from phinetune.cli import console
from phinetune.cli.data_options import Columns, model_folder, read_options

if TYPE_CHECKING:
    from phinetune.data.changing.augmenting import Paraphrase


def augment(
    file: Annotated[Path, typer.Argument(help="Data file.", show_default=False)],
    to: Annotated[Path, typer.Option(help="New file: the old rows, then the new ones.", show_default=False)],
    way: Annotated[
        list[str] | None,
        typer.Option(help="typos, case or paraphrase; again for more.", show_default="typos"),
    ] = None,
    share: Annotated[float, typer.Option(help="Share of the rows that are used for each way.")] = 0.3,
    seed: Annotated[int, typer.Option(help="The same seed makes the same rows.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="Model for paraphrases: a folder or a hub name.", show_default=False)
    ] = None,
    columns: Columns = None,
) -> None:
    """Add rows whose prompts have typing errors, another case or other words; answers stay."""
    from phinetune.data.changing.augmenting import augment_file

    ways = tuple(way or ("typos",))
    paraphrase = _paraphrase(model) if model and "paraphrase" in ways else None
    counts = augment_file(
        file,
        to,
        ways,
        share=share,
        seed=seed,
        paraphrase=paraphrase,
        options=read_options(columns, None, None),
    )
    for name, count in counts.items():
        console.say(f"{count:>8,} rows by {name}")
    console.say(f"written to {to}; its recipe marks the new rows as synthetic")
    console.next_commands(f"phinetune data check {shlex.quote(str(to))}")


def _paraphrase(model: str) -> Paraphrase:
    """A local model asked to say a prompt in other words, the likeliest answer."""
    from phinetune.data.conversation import Message
    from phinetune.generation.greedy import generate_batch
    from phinetune.models.loading import load_base
    from phinetune.text.render import load_renderer

    base = load_base(model)
    renderer = load_renderer(model_folder(model))

    def paraphrase(text: str) -> str:
        asked = f"Say this in other words. Answer with the new wording only.\n\n{text}"
        ids = renderer.prompt([Message(role="user", content=asked)])
        limit = min(2 * len(ids), 512)
        (answer,) = generate_batch(base, [ids], max_new_tokens=limit, stop_ids=renderer.stop_ids)
        return renderer.decode(answer).strip()

    return paraphrase


def system_prompt(
    task: Annotated[
        str | None,
        typer.Option(help="style, json, classify, extract or persona.", show_default=False),
    ] = None,
    training: Annotated[str, typer.Option(help="The prompt to train with, to be looked at.")] = "",
    inference: Annotated[str, typer.Option(help="The prompt to ask with, to be looked at.")] = "",
) -> None:
    """Templates of system prompts, short to train with and longer to ask with; or advice on yours."""
    from phinetune.data.system_prompts import TEMPLATES, lint_prompts, template

    if training or inference:
        advice = lint_prompts(training, inference)
        for entry in advice:
            console.say(Text.assemble((entry.rule, "yellow"), f": {entry.message}\n    fix: {entry.fix}"))
        if not advice:
            console.say(Text("nothing to change", style="green"))
        console.stop(console.USER_INPUT if advice else console.DONE)
    chosen = [template(task)] if task else list(TEMPLATES)
    for shown in chosen:
        if shown is None:
            names = [entry.task for entry in TEMPLATES]
            near = nearest(task or "", names)
            do = f"did you mean {near}?" if near else f"choose among {', '.join(names)}"
            raise SettingsError(f"there is no template for '{task}'", where="--task", do=do)
        console.say(Text.assemble((shown.task, "bold"), f": {shown.when}"))
        console.say(f"  train with  {shown.training}", f"  ask with    {shown.inference}", "")
    console.next_commands('phinetune train my-project --set system_prompt="..."')


COMMANDS = (augment, system_prompt)
