"""Chatting keeps the turns, obeys its commands, and survives a prompt that is too long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phinetune.base.errors import AdapterError, UserError
from phinetune.cli.chat import Talk
from phinetune.data.conversation import Conversation
from phinetune.data.reading import load_examples
from phinetune.generation.sampling import GREEDY, Sampling


class EchoModel:
    """Answers with what it was asked, and remembers the calls."""

    def __init__(self, *, has_adapter: bool = True, system_prompt: str | None = None) -> None:
        self.base = SimpleNamespace(name="echo", quantize="none")
        self.adapters = ["adapter"] if has_adapter else []
        self.system_prompt, self.data_system_prompt = system_prompt, None
        self.calls: list[tuple[list[tuple[str, str]], str]] = []
        self.temperatures: list[float] = []
        self.forced: dict[str, str] = {}

    @property
    def has_own_adapter(self) -> bool:
        return "adapter" in self.adapters

    def load_adapter(self, name: str, path: Path, *, force_base: bool) -> None:
        if "bad" in name:
            raise AdapterError("this is no adapter", where=str(path))
        self.adapters.append(name)

    def stream(
        self, prompt: Any, *, with_adapter: bool, adapter: str | None, sampling: Sampling, max_new_tokens: int
    ) -> Iterator[str]:
        turns = [(message.role, message.content) for message in prompt]
        if turns[-1][1] == "long":
            raise UserError("a prompt does not fit")
        if turns[-1][1] == "stop me":
            yield "half"
            raise KeyboardInterrupt
        self.calls.append(
            (turns, adapter or ("adapter" if with_adapter and self.has_own_adapter else "base"))
        )
        self.temperatures.append(sampling.temperature)
        yield from ("you said ", turns[-1][1])


def talk(model: EchoModel, *lines: str, system: str | None = None) -> None:
    talking = Talk(model, system=system, max_new_tokens=9, sampling=GREEDY)  # type: ignore[arg-type]
    talking.run(f"{line}\n" for line in lines)


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
    assert [side for _, side in model.calls] == ["adapter", "base", "adapter"]


def test_a_base_model_has_no_adapter_to_switch(capsys: pytest.CaptureFixture[str]) -> None:
    model = EchoModel(has_adapter=False)
    talk(model, "/adapter on", "one")
    assert "there is no adapter" in capsys.readouterr().err
    assert model.calls[0][1] == "base"


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
        Talk(model, system="other", max_new_tokens=9, sampling=GREEDY).greet()  # type: ignore[arg-type]


def test_further_adapters_are_loaded_and_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    model = EchoModel()
    talk(
        model, "/load runs/formal.safetensors", "/adapter formal", "one", "/adapter frmal", "two", "/load bad"
    )
    assert [side for _, side in model.calls] == ["formal", "formal"]
    told = capsys.readouterr().err
    assert "no adapter 'frmal'; there are adapter, formal" in told
    assert "this is no adapter" in told


def test_the_last_question_can_be_taken_back() -> None:
    model = EchoModel()
    talk(model, "one", "two", "/undo", "three")
    assert model.calls[2][0] == [("user", "one"), ("assistant", "you said one"), ("user", "three")]


def test_the_conversation_is_shown_and_saved_as_training_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    talk(EchoModel(), "one", "/history", f"/save {tmp_path}/chat.json", system="Be brief.")
    assert "assistant: you said one" in capsys.readouterr().err
    (example,) = load_examples(tmp_path / "chat.json")
    assert isinstance(example, Conversation)
    assert [message.content for message in example.messages] == ["Be brief.", "one", "you said one"]


def test_the_temperature_is_set() -> None:
    model = EchoModel()
    talk(model, "one", "/temperature 0.7", "two", "/temperature warm", "/temperature -1", "three")
    assert model.temperatures == [0.0, 0.7, 0.7]
