"""The examples that people write: conversations and plain text, each with the line it came from.

Knows nothing of file formats or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where an example stands: the file as the user named it, and the 1-based line it begins on."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. An assistant turn with weight 0 is read by the model but not trained."""

    role: Role
    content: str
    weight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A chat of one or more turns."""

    messages: tuple[Message, ...]
    source: Source
    label: str | None = None  # read by task: classification alone


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainText:
    """A document without turns."""

    text: str
    source: Source
    label: str | None = None


Example = Conversation | PlainText
