"""`phinetune compare`: base and adapter answer the same prompts, beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phinetune.base.errors import UserError
from phinetune.cli import console

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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
) -> None:
    """Let base and adapter answer the same prompts, always taking the likeliest token.

    Without prompts: the first of the run's test set.
    """
    from phinetune import api

    questions = [*_from_options(prompt or []), *(_from_file(prompts) if prompts else [])]
    if not questions:
        questions = [_question(example) for example in api.test_set_of(run)[:NUM_FROM_TEST_SET]]
    console.note(f"plan     {len(questions):,} prompts, each answered twice", style="dim")
    model = api.load(run)
    if model.adapter is None:
        raise UserError(
            f"'{run}' has no adapter",
            why="there is nothing to compare the base with",
            do="name a run folder, or a folder with adapter_config.json",
        )
    asked = [model.messages(messages) for messages, _ in questions]
    sides = {
        side: model.answers(asked, with_adapter=side == "adapter", max_new_tokens=max_new_tokens)
        for side in ("base", "adapter")
    }
    answers = [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in asked[index]],
            "reference": reference,
            "base": sides["base"][index],
            "adapter": sides["adapter"][index],
        }
        for index, (_, reference) in enumerate(questions)
    ]
    _show(answers, run, as_json=json)


def _show(answers: list[dict[str, Any]], run: Path, *, as_json: bool) -> None:
    if as_json:
        console.print_json({"answers": answers})
        return
    from phinetune.cli.comparison_view import answers_view

    console.say(*answers_view(answers))
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
