"""What a chat is made of before it becomes ids: control tokens and text, never mixed in one string.

Knows nothing of tokenizers or of any one template.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from phinetune.data.conversation import Message


@dataclass(frozen=True, slots=True)
class Control:
    """A control token, named by its surface; `trained` when the model must learn to give it."""

    surface: str
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """Text that can never become a control token, whatever it holds."""

    text: str
    trained: bool = False


Piece = Control | Text


class Template(Protocol):
    """How one family of models writes a chat."""

    @property
    def name(self) -> str: ...

    @property
    def stop_surfaces(self) -> tuple[str, ...]:
        """Control tokens at which an answer ends."""

    def pieces(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[Piece]:
        """The chat, with the assistant's header after it when `generation_prompt`.

        Trained: the content of assistant turns with weight 1 and the token that ends them.
        Raises DataError when the chat cannot be written this way.
        """


def as_text(pieces: Iterable[Piece]) -> str:
    """The chat as one string, for people and for comparing templates; never to be tokenised.

    >>> as_text([Control("<|user|>"), Text("Hi"), Control("<|end|>")])
    '<|user|>Hi<|end|>'
    """
    return "".join(piece.surface if isinstance(piece, Control) else piece.text for piece in pieces)
