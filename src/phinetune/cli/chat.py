"""`phinetune chat`: talk with a model, with any of its adapters or without."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phinetune.base.errors import UserError, nearest
from phinetune.cli import console
from phinetune.cli.adapter_place import ForceBase, adapter_name, adapter_path, forced_words

if TYPE_CHECKING:
    from phinetune.data.conversation import Message
    from phinetune.generation.model import Model
    from phinetune.generation.sampling import Sampling

COMMANDS = {
    "/adapter on|off|NAME": "answer with the adapter, with the base alone, or with another adapter",
    "/load PATH": "add the adapter of a run or a file, under its name",
    "/temperature T": "0 takes the likeliest token, more is more varied",
    "/history": "show the conversation",
    "/undo": "forget the last question and its answer",
    "/save FILE": "add the conversation to a file, as a line of training data",
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
    adapter: Annotated[
        list[Path] | None, typer.Option(help="A further run or adapter; may be repeated.", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the likeliest tokens.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    force_base: ForceBase = False,
) -> None:
    """Talk with a model. Answers appear word by word; /exit leaves."""
    from phinetune import api
    from phinetune.generation.sampling import Sampling

    console.note("loading ...", style="dim")
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    loaded = api.load(model, force_base=force_base)
    talk = Talk(
        loaded, system=system, max_new_tokens=max_new_tokens, sampling=sampling, force_base=force_base
    )
    for path in adapter or []:
        talk.load(path)
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

    def __init__(
        self,
        model: Model,
        *,
        system: str | None,
        max_new_tokens: int,
        sampling: Sampling,
        force_base: bool = False,
    ) -> None:
        self._model, self._system, self._max_new_tokens = model, system, max_new_tokens
        self._sampling, self._force_base = sampling, force_base
        self._side = "adapter" if model.has_own_adapter else "base"
        self._turns: list[Message] = []

    def greet(self) -> None:
        """Say who answers, with what system message, and how to leave."""
        from phinetune.generation.model import OWN

        model = self._model
        kept = model.base.quantize
        base = model.base.name + (f" in {kept}" if kept != "none" else "")
        console.note(f"{base} with the adapter" if model.has_own_adapter else f"{base}, without an adapter")
        if OWN in model.forced:
            console.note(forced_words(model.forced[OWN]), style="yellow")
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
            console.note(f"{command:<22}{meaning}", style="dim")

    def run(self, lines: Iterable[str]) -> None:
        """Answer each line until one leaves; Ctrl-C stops an answer, not the conversation."""
        for line in lines:
            text = line.strip()
            if text.startswith("/"):
                try:
                    if not self._command(text):
                        return
                except UserError as error:
                    console.show_error(error)
            elif text:
                self._answer(text, sys.stdout.write)

    def load(self, path: Path) -> None:
        """Add an adapter under its run's or file's name. Raises `AdapterError` when it does not fit."""
        name = adapter_name(path)
        self._model.load_adapter(name, adapter_path(path), force_base=self._force_base)
        if name in self._model.forced:
            console.note(forced_words(self._model.forced[name]), style="yellow")
        console.note(f"loaded '{name}'; /adapter {name} answers with it", style="dim")

    def _command(self, text: str) -> bool:
        """Obey a command; False to leave."""
        word, _, argument = text.partition(" ")
        argument = argument.strip()
        match word.lower():
            case "/exit" | "/quit":
                return False
            case "/reset":
                self._turns = []
                console.note("the conversation is forgotten", style="dim")
            case "/undo":
                self._turns = self._turns[:-2]
                console.note("the last question and its answer are forgotten", style="dim")
            case "/history":
                for turn in self._turns:
                    console.note(f"{turn.role}: {turn.content}")
            case "/adapter":
                self._choose(argument)
            case "/load" if argument:
                self.load(Path(argument))
            case "/save" if argument:
                self._save(Path(argument))
            case "/temperature" if argument:
                self._set_temperature(argument)
            case _:
                self._unknown(word)
        return True

    def _unknown(self, word: str) -> None:
        near = nearest(word, [command.split()[0] for command in COMMANDS])
        known = next((command for command in COMMANDS if command.split()[0] == near), None)
        hint = f"; did you mean {known}?" if known else f"; there are {', '.join(COMMANDS)}"
        console.note(f"no command {word}{hint}", style="yellow")

    def _choose(self, name: str) -> None:
        names = self._model.adapters
        if not names:
            console.note("there is no adapter: this is a base model; /load PATH adds one", style="yellow")
            return
        side = {"on": "adapter", "off": "base", "": self._side}.get(name.lower(), name)
        if side not in (*names, "base"):
            console.note(f"no adapter '{name}'; there are {', '.join(names)}", style="yellow")
            return
        self._side = side
        console.note(f"answers come from {_called(side)}", style="dim")

    def _set_temperature(self, text: str) -> None:
        try:
            self._sampling = replace(self._sampling, temperature=float(text))
        except ValueError:
            console.note(f"'{text}' is no number", style="yellow")

    def _save(self, path: Path) -> None:
        import json

        system = [{"role": "system", "content": self._system}] if self._system else []
        turns = [{"role": turn.role, "content": turn.content} for turn in self._turns]
        if not turns:
            console.note("there is nothing to save yet", style="yellow")
            return
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": [*system, *turns]}, ensure_ascii=False) + "\n")
        console.note(f"added to {path}", style="dim")

    def _answer(self, text: str, write: Callable[[str], object]) -> None:
        from phinetune.data.conversation import Message

        asked = [*self._turns, Message(role="user", content=text)]
        system = [Message(role="system", content=self._system)] if self._system else []
        answer = ""
        try:
            pieces = self._model.stream(
                [*system, *asked],
                with_adapter=self._side != "base",
                adapter=None if self._side in ("base", "adapter") else self._side,
                sampling=self._sampling,
                max_new_tokens=self._max_new_tokens,
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


def _called(side: str) -> str:
    return {"adapter": "the adapter", "base": "the base"}.get(side, f"the adapter '{side}'")
