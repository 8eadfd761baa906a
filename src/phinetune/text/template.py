"""The chat templates of the Phi family, written as pieces instead of one string.

| name | turn | after the last turn |
|---|---|---|
| phi3 | `<|role|>` newline content `<|end|>` newline | end of text |
| phi3.5 | the same; an empty system message is left out | end of text |
| phi4-mini | `<|role|>` content `<|end|>` | end of text |
| phi4 | `<|im_start|>` role `<|im_sep|>` content `<|im_end|>` | nothing |

Knows nothing of ids; `jinja` holds every other template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phinetune.base.errors import DataError
from phinetune.data.conversation import Message, Role
from phinetune.text.jinja import JinjaTemplate
from phinetune.text.pieces import Control, Piece, Template, Text, as_text

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleTokenTemplate:
    """Phi-3, Phi-3.5 and Phi-4-mini: one control token per role.

    >>> from phinetune.text.pieces import as_text
    >>> template = RoleTokenTemplate(name="phi3", end_of_text="<|endoftext|>")
    >>> as_text(template.pieces([Message(role="user", content="Hi")], generation_prompt=True))
    '<|user|>\\nHi<|end|>\\n<|assistant|>\\n'
    """

    name: str
    end_of_text: str
    line_break: str = "\n"
    skips_empty_system: bool = False

    @property
    def stop_surfaces(self) -> tuple[str, ...]:
        # A role's token can be no part of an answer: a model that gives one has begun another turn.
        return ("<|end|>", self.end_of_text, *(f"<|{role}|>" for role in ROLES))

    def pieces(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[Piece]:
        """See `Template.pieces`."""
        pieces: list[Piece] = []
        for message in messages:
            if self.skips_empty_system and message.role == "system" and not message.content:
                continue
            trained = message.role == "assistant" and message.weight == 1
            pieces += [
                Control(f"<|{message.role}|>"),
                Text(self.line_break),
                Text(message.content, trained),
                Control("<|end|>", trained),
                Text(self.line_break),
            ]
        if generation_prompt:
            return [*pieces, Control("<|assistant|>"), Text(self.line_break)]
        return [*pieces, Control(self.end_of_text)]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRoleTemplate:
    """Phi-4 (14B): the role is a word between two control tokens."""

    name: str = "phi4"

    @property
    def stop_surfaces(self) -> tuple[str, ...]:
        return ("<|im_end|>", "<|im_start|>")

    def pieces(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[Piece]:
        """See `Template.pieces`."""
        pieces: list[Piece] = []
        for message in messages:
            trained = message.role == "assistant" and message.weight == 1
            pieces += [*_header(message.role), Text(message.content, trained), Control("<|im_end|>", trained)]
        return pieces + _header("assistant") if generation_prompt else pieces


def _header(role: str) -> list[Piece]:
    return [Control("<|im_start|>"), Text(role), Control("<|im_sep|>")]


PhiTemplate = RoleTokenTemplate | NamedRoleTemplate


def choose_template(
    end_of_text: str | None, surfaces: frozenset[str], jinja: JinjaTemplate | None
) -> Template | None:
    """The Phi template that writes the same as the model's own, else the model's own.

    A model that brings none is given the Phi template that its control tokens tell; None when they tell none.
    """
    candidates = _phi_templates(surfaces, end_of_text)
    if jinja is None:
        return candidates[0] if candidates else None
    return next((template for template in candidates if _write_the_same(template, jinja)), jinja)


def _write_the_same(template: PhiTemplate, jinja: JinjaTemplate) -> bool:
    try:
        return all(
            as_text(template.pieces(chat, generation_prompt=flag)) == jinja.text(chat, generation_prompt=flag)
            for chat in _PROBES
            for flag in (True, False)
        )
    except DataError:
        return False


def _chat(*turns: tuple[Role, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in turns]


# Blank, padded and repeated turns: where templates of one family differ.
_PROBES = (
    _chat(("user", "a")),
    _chat(("user", " a\n"), ("assistant", "\tb ")),
    _chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")),
    _chat(("system", ""), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
    _chat(("user", "a"), ("assistant", "<think>x</think>y"), ("user", "c"), ("assistant", "d")),
)


def _phi_templates(surfaces: frozenset[str], end_of_text: str | None) -> list[PhiTemplate]:
    """The Phi templates that a tokenizer with these control tokens can write, likeliest first."""
    found: list[PhiTemplate] = []
    if end_of_text and surfaces >= {"<|end|>", end_of_text, *(f"<|{role}|>" for role in ROLES)}:
        phi3 = RoleTokenTemplate(name="phi3", end_of_text=end_of_text)
        phi35 = RoleTokenTemplate(name="phi3.5", end_of_text=end_of_text, skips_empty_system=True)
        phi4_mini = RoleTokenTemplate(name="phi4-mini", end_of_text=end_of_text, line_break="")
        # Only Phi-4-mini's tokenizer has a token for tools.
        found += [phi4_mini, phi3, phi35] if "<|tool|>" in surfaces else [phi3, phi35, phi4_mini]
    if surfaces >= {"<|im_start|>", "<|im_sep|>", "<|im_end|>"}:
        found.append(NamedRoleTemplate())
    return found
