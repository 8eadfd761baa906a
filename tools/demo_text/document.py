"""One training document: plain text, or a chat of turns. Knows no tokenizer and no file format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["text", "system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """A stretch of text; `learn` says whether its tokens count in the loss."""

    role: Role
    text: str
    learn: bool = True


Document = tuple[Turn, ...]


def plain(text: str) -> Document:
    """Plain text, all of it learnt."""
    return (Turn("text", text),)


def task(question: str, answer: str, system: str = "", learn_question: bool = False) -> Document:
    """A single-turn chat; a made-up question full of random words is not worth predicting."""
    turns = [Turn("user", question, learn_question), Turn("assistant", answer)]
    if system:
        turns.insert(0, Turn("system", system, learn_question))
    return tuple(turns)
