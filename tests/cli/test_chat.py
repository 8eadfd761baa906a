"""Chatting keeps the turns, obeys its commands, and survives a prompt that is too long."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from phinetune.base.errors import UserError
from phinetune.cli.chat import Talk


class EchoModel:
    """Answers with what it was asked, and remembers the calls."""

    def __init__(self, *, has_adapter: bool = True, system_prompt: str | None = None) -> None:
        self.base = SimpleNamespace(name="echo")
        self.adapter = object() if has_adapter else None
        self.system_prompt, self.data_system_prompt = system_prompt, None
        self.calls: list[tuple[list[tuple[str, str]], bool]] = []

    def stream(self, prompt: Any, *, with_adapter: bool, max_new_tokens: int) -> Iterator[str]:
        turns = [(message.role, message.content) for message in prompt]
        if turns[-1][1] == "long":
            raise UserError("a prompt does not fit")
        if turns[-1][1] == "stop me":
            yield "half"
            raise KeyboardInterrupt
        self.calls.append((turns, with_adapter))
        yield from ("you said ", turns[-1][1])


def talk(model: EchoModel, *lines: str, system: str | None = None) -> None:
    Talk(model, system=system, max_new_tokens=9).run(f"{line}\n" for line in lines)  # type: ignore[arg-type]


def test_turns_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    model = EchoModel()
    talk(model, "one", "", "two")
    assert capsys.readouterr().out == "you said one\nyou said two\n"
    assert model.calls[1][0] == [("user", "one"), ("assistant", "you said one"), ("user", "two")]


def test_the_system_message_stands_first() -> None:
    model = EchoModel()
    talk(model, "one", "two", system="Be brief.")
    assert [turns[0] for turns, _ in model.calls] == [("system", "Be brief.")] * 2


def test_reset_forgets() -> None:
    model = EchoModel()
    talk(model, "one", "/reset", "two")
    assert model.calls[1][0] == [("user", "two")]


def test_exit_leaves() -> None:
    model = EchoModel()
    talk(model, "/exit", "one")
    assert model.calls == []


def test_the_adapter_is_switched() -> None:
    model = EchoModel()
    talk(model, "one", "/adapter off", "two", "/adapter on", "three")
    assert [with_adapter for _, with_adapter in model.calls] == [True, False, True]


def test_a_base_model_has_no_adapter_to_switch(capsys: pytest.CaptureFixture[str]) -> None:
    model = EchoModel(has_adapter=False)
    talk(model, "/adapter on", "one")
    assert "there is no adapter" in capsys.readouterr().err
    assert model.calls[0][1] is False


def test_unknown_commands_offer_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    talk(EchoModel(), "/rest")
    assert "did you mean /reset?" in capsys.readouterr().err


def test_a_turn_that_does_not_fit_is_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    model = EchoModel()
    talk(model, "one", "long", "two")
    assert "this turn was not kept" in capsys.readouterr().err
    assert ("user", "long") not in model.calls[1][0]


def test_interrupting_stops_the_answer_only() -> None:
    model = EchoModel()
    talk(model, "stop me", "two")
    assert model.calls[0][0] == [("user", "stop me"), ("assistant", "half"), ("user", "two")]


def test_a_trained_system_prompt_cannot_be_replaced() -> None:
    model = EchoModel(system_prompt="trained")
    with pytest.raises(UserError, match="system prompt of its own"):
        Talk(model, system="other", max_new_tokens=9).greet()  # type: ignore[arg-type]
