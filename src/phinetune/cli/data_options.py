"""What the commands on data share: how a file is read, and what is handed to the rules from above.

The rules know no tokens, filter or model; here a tokenizer, the filter and a base are put into their hands.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phinetune.base.errors import SettingsError, nearest
from phinetune.cli import console

if TYPE_CHECKING:
    from phinetune.data.checking import CheckOptions, CheckReport
    from phinetune.data.conversation import Example
    from phinetune.data.formats.row_forms import ReadOptions
    from phinetune.data.rules.judged import Judge, LossOf
    from phinetune.data.rules.lengths import TokenCount, TokenCounter

Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="SLOT=COLUMN",
        help="Name a column: prompt, answer, system, context, text or label.",
        show_default=False,
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        "--keep", help="preferred: read preference pairs by their preferred answers.", show_default=False
    ),
]
Tools = Annotated[
    str | None,
    typer.Option("--tools", help="text: write tool calls and results out as text.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(help="Count tokens as this model does: demo, a folder, or a hub name.", show_default=False),
]
Seqlen = Annotated[int, typer.Option(min=1, help="Sequence length; longer rows are cut (with --model).")]

NUM_JUDGED = 20_000


def read_options(columns: list[str] | None, keep: str | None, tools: str | None) -> ReadOptions:
    """The options as one; raises `SettingsError` on a word that is not known."""
    from phinetune.data.formats.row_forms import ReadOptions, column_options

    _one_of("--keep", keep, ("preferred",))
    _one_of("--tools", tools, ("text",))
    return ReadOptions(
        columns=column_options(columns or []),
        keep_preferred=keep is not None,
        tools_as_text=tools is not None,
    )


def reading_flags(columns: list[str] | None, keep: str | None = None, tools: str | None = None) -> str:
    """The same options as a shell takes them, each after a blank: for a command that reads the file again."""
    flags = [part for column in columns or [] for part in ("--map", column)]
    flags += ["--keep", keep] if keep else []
    flags += ["--tools", tools] if tools else []
    return f" {shlex.join(flags)}" if flags else ""


def _one_of(name: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        near = nearest(value, known) or known[0]
        raise SettingsError(f"{name} cannot be '{value}'", where=name, do=f"write {name} {near}")


def told_check(file: Path, options: CheckOptions) -> CheckReport:
    """The check of a file; where somebody watches, a line says how far it is."""
    from phinetune.data.checking import check_file

    screen = console.err()
    if not screen.is_terminal:
        return check_file(file, options)
    with screen.status(f"reading {file.name}") as status:
        return check_file(
            file,
            replace(options, on_rows=lambda count: status.update(f"{file.name}: {count:,} rows looked at")),
        )


def token_counter(model: str, seqlen: int) -> TokenCounter:
    """Counts an example's tokens with a model's own template; its weights are not needed."""
    from phinetune.base.errors import DataError
    from phinetune.data.rules.lengths import TokenCount
    from phinetune.text.render import load_renderer

    renderer = load_renderer(model_folder(model))

    def count(example: Example) -> TokenCount:
        try:
            (rendered,) = renderer.examples([example])
        except DataError:  # what the template cannot write is not trained
            return TokenCount(num_tokens=0, num_trained=0)
        trained = rendered.trained
        return TokenCount(
            num_tokens=rendered.num_tokens,
            num_trained=int(trained.sum()),
            num_trained_lost=int(trained[seqlen:].sum()),
            num_lost=max(0, rendered.num_tokens - seqlen),
        )

    return count


def toxic_options(choice: str) -> tuple[Judge | None, int | None]:
    """The bundled filter and how many rows it judges: all, none, or the first ones."""
    _one_of("--toxic", choice, ("some", "all", "none"))
    return (None, None) if choice == "none" else (filter_judge(), None if choice == "all" else NUM_JUDGED)


def filter_judge() -> Judge:
    """The bundled content filter, where it sees grave harm, in words."""
    from phinetune.safety.categories import Severity
    from phinetune.safety.linear import bundled

    classifier = bundled()

    def judge(text: str) -> str:
        grave = {kind: level for kind, level in classifier.severities(text).items() if level >= Severity.HIGH}
        return ", ".join(f"{kind} {level.name.lower()}" for kind, level in grave.items())

    return judge


def base_loss(model: str, seqlen: int) -> LossOf:
    """The mean loss of a base on an example's trained tokens; 0 where nothing is trained."""
    from phinetune.base.errors import DataError
    from phinetune.evaluation.scores import score_examples
    from phinetune.models.loading import load_base
    from phinetune.text.render import Rendered, load_renderer

    base = load_base(model)
    renderer = load_renderer(model_folder(model))

    def loss_of(example: Example) -> float:
        try:
            (whole,) = renderer.examples([example])
        except DataError:
            return 0.0
        rendered = Rendered(ids=whole.ids[:seqlen], trained=whole.trained[:seqlen], source=whole.source)
        if not rendered.trained.any():
            return 0.0
        scores = score_examples(base, [rendered])
        return float(scores.nll_N[0] / scores.num_trained_N[0])

    return loss_of


def model_folder(name: str) -> Path:
    """A folder with a tokenizer is enough here; weights are not needed to look at tokens."""
    from phinetune.models.catalog import DEMO, demo_folder, find_model

    if name == DEMO:
        return demo_folder()
    return Path(name) if (Path(name) / "tokenizer.json").is_file() else find_model(name)
