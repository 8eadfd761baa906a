"""`phinetune chat`: talk with a model, with or without its adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from phinetune.base.errors import UserError, nearest
from phinetune.cli import console

if TYPE_CHECKING:
    from phinetune.api import Model
    from phinetune.data.conversation import Message

COMMANDS = {
    "/adapter on": "answer with the adapter",
    "/adapter off": "answer with the base alone",
    "/reset": "forget the conversation",
    "/exit": "leave",
}


def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="Run folder, adapter folder, or base model.", show_default=False
        ),
    ],
    system: Annotated[
        str | None, typer.Option(help="System message; a run's own when left out.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
) -> None:
    """Talk with a model. Answers appear word by word; /exit leaves."""
    from phinetune import api

    console.note("loading ...", style="dim")
    talk = Talk(api.load(model), system=system, max_new_tokens=max_new_tokens)
    talk.greet()
    talk.run(_typed_lines())


def _typed_lines() -> Iterable[str]:
    """Lines from the keyboard, or from a pipe; ends at the end of input."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("\nyou> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line


class Talk:
    """One conversation: its turns so far, and which side answers."""

    def __init__(self, model: Model, *, system: str | None, max_new_tokens: int) -> None:
        self._model, self._system, self._max_new_tokens = model, system, max_new_tokens
        self._with_adapter = model.adapter is not None
        self._turns: list[Message] = []

    def greet(self) -> None:
        """Say who answers, with what system message, and how to leave."""
        base = self._model.base.name
        console.note(f"{base} with the adapter" if self._model.adapter else f"{base}, without an adapter")
        model = self._model
        system = model.system_prompt or self._system or model.data_system_prompt
        if model.system_prompt and self._system:
            raise UserError(
                "this run has a system prompt of its own",
                where="--system",
                why=f"it was trained with: {model.system_prompt}",
                do="leave --system out",
            )
        if system:
            console.note(f"system message: {system}", style="dim")
        for command, meaning in COMMANDS.items():
            if self._model.adapter or not command.startswith("/adapter"):
                console.note(f"{command:<14}{meaning}", style="dim")

    def run(self, lines: Iterable[str]) -> None:
        """Answer each line until one leaves; Ctrl-C stops an answer, not the conversation."""
        for line in lines:
            text = line.strip()
            if text.startswith("/"):
                if not self._command(text):
                    return
            elif text:
                self._answer(text, sys.stdout.write)

    def _command(self, text: str) -> bool:
        """Obey a command; False to leave."""
        words = " ".join(text.lower().split())
        if words in ("/exit", "/quit"):
            return False
        if words == "/reset":
            self._turns = []
            console.note("the conversation is forgotten", style="dim")
        elif words in ("/adapter on", "/adapter off") and self._model.adapter is not None:
            self._with_adapter = words.endswith("on")
            console.note(f"answers come from {self._side}", style="dim")
        elif words.startswith("/adapter") and self._model.adapter is None:
            console.note("there is no adapter: this is a base model", style="yellow")
        else:
            near = nearest(words, COMMANDS)
            hint = f"; did you mean {near}?" if near else f"; there are {', '.join(COMMANDS)}"
            console.note(f"no command {words}{hint}", style="yellow")
        return True

    @property
    def _side(self) -> str:
        return "the adapter" if self._with_adapter else "the base"

    def _answer(self, text: str, write: Callable[[str], object]) -> None:
        from phinetune.data.conversation import Message

        asked = [*self._turns, Message(role="user", content=text)]
        system = [Message(role="system", content=self._system)] if self._system else []
        answer = ""
        try:
            pieces = self._model.stream(
                [*system, *asked], with_adapter=self._with_adapter, max_new_tokens=self._max_new_tokens
            )
            for piece in pieces:
                answer += piece
                write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            console.note("\n(stopped)", style="dim")
        except UserError as error:
            # Too long for the model, most likely: the conversation so far stays, this turn does not.
            console.show_error(error)
            console.note("this turn was not kept; /reset starts a new conversation", style="dim")
            return
        write("\n")
        self._turns = [*asked, Message(role="assistant", content=answer)]
