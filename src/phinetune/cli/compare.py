"""`phinetune compare`: the base and its adapters answer the same prompts, beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phinetune.base.errors import UserError
from phinetune.cli import console
from phinetune.cli.adapter_place import ForceBase, adapter_name, adapter_path, forced_words

if TYPE_CHECKING:
    from phinetune.data.conversation import Message

NUM_FROM_TEST_SET = 3


def compare(
    run: Annotated[Path, typer.Argument(help="Run folder, or adapter folder.", show_default=False)],
    prompts: Annotated[
        Path | None,
        typer.Argument(help="File of prompts: .txt with one per line, or chats.", show_default=False),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be repeated.", show_default=False)
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="A further run or adapter; may be repeated.", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same draws for every side.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    force_base: ForceBase = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page of the answers.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
) -> None:
    """Let the base and any number of adapters answer the same prompts, all in one batch.

    Without prompts: the first of the run's test set.
    """
    from phinetune import api
    from phinetune.generation.sampling import Sampling

    questions = [*_from_options(prompt or []), *(_from_file(prompts) if prompts else [])]
    if not questions:
        questions = [_question(example) for example in api.test_set_of(run)[:NUM_FROM_TEST_SET]]
    if html and html.exists():
        raise UserError("something is there already", where=str(html), do="name a new file")
    model = api.load(run, force_base=force_base)
    for path in adapter or []:
        model.load_adapter(adapter_name(path), adapter_path(path), force_base=force_base)
    for difference in model.forced.values():
        console.note(forced_words(difference), style="yellow")
    if not model.adapters:
        raise UserError(
            f"'{run}' has no adapter",
            why="there is nothing to compare the base with",
            do="name a run folder, a folder with adapter_config.json, or give --adapter",
        )
    sides = ["base", *model.adapters]
    console.note(f"plan     {len(questions):,} prompts, each answered by {', '.join(sides)}", style="dim")
    asked = [model.messages(messages) for messages, _ in questions]
    found = model.answers(
        asked, sides, sampling=Sampling(temperature=temperature, seed=seed), max_new_tokens=max_new_tokens
    )
    answers = [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in asked[index]],
            "reference": reference,
            **{side: found[side][index] for side in sides},
        }
        for index, (_, reference) in enumerate(questions)
    ]
    if html:
        from phinetune.reports.answers_page import write_answers

        write_answers(html, str(run), sides, answers)
    _show(answers, sides, run, html, as_json=json)


def _show(
    answers: list[dict[str, Any]], sides: list[str], run: Path, html: Path | None, *, as_json: bool
) -> None:
    if as_json:
        console.print_json({"answers": answers})
        return
    from phinetune.cli.comparison_view import answers_view

    console.say(*answers_view(answers, sides))
    if html:
        console.say(f"page     {html}")
    console.next_commands(f"phinetune chat {run}", f"phinetune evaluate {run}")


Question = tuple[tuple["Message", ...], str | None]


def _from_options(prompts: list[str]) -> list[Question]:
    from phinetune.data.conversation import Message

    return [((Message(role="user", content=text),), None) for text in prompts]


def _from_file(path: Path) -> list[Question]:
    from phinetune.data.reading import load_examples

    if not path.is_file():
        raise UserError(f"there is no file '{path}'", where=str(path), do="check the path")
    if path.suffix.lower() == ".txt":
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        return _from_options([line for line in lines if line])
    return [_question(example) for example in load_examples(path)]


def _question(example: Any) -> Question:
    """The turns before the last answer, and that answer; a plain text is a prompt as it stands."""
    from phinetune.data.conversation import Conversation, Message

    if not isinstance(example, Conversation):
        return (Message(role="user", content=example.text),), None
    messages = example.messages
    if messages[-1].role == "assistant":
        return messages[:-1], messages[-1].content
    return messages, None
