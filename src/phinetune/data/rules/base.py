"""What a rule is, what it sees of a row, and how it speaks. Knows none of the rules.

A check looks at every row once, in order, and may speak again at the end. Whatever it keeps of a row is a few
bytes: a million rows must fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from phinetune.data.conversation import Conversation, Example, Source
from phinetune.data.findings import Finding, Severity, excerpt

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One thing that may be wrong. `meaning`: why it matters; `can_clean`: what `data clean` does, or ""."""

    id: str
    severity: Severity
    meaning: str
    fix: str
    can_clean: str = ""

    def finding(
        self, source: Source, message: str, *, field: str = "", seen: str = "", around: int = 0, fix: str = ""
    ) -> Finding:
        """The finding of this rule at a place; `seen` is shown in an excerpt."""
        return Finding(
            rule=self.id,
            severity=self.severity,
            file=source.file,
            line=source.line,
            field=field,
            message=message,
            fix=fix or self.fix,
            excerpt=excerpt(seen, around) if seen else "",
        )


class RowView:
    """An example as the rules see it; what several of them need is made once."""

    def __init__(self, example: Example, number: int) -> None:
        self.example = example
        self.number = number
        self.source = example.source

    @cached_property
    def parts(self) -> tuple[tuple[str, str, str], ...]:
        """(field, role, text) of every turn; a document is one text of nobody."""
        if isinstance(self.example, Conversation):
            return tuple(
                (f"messages[{index}].content", message.role, message.content)
                for index, message in enumerate(self.example.messages)
            )
        return (("text", "", self.example.text),)

    def _of(self, role: str) -> str:
        return "\n".join(text for _, its_role, text in self.parts if its_role == role)

    @cached_property
    def system(self) -> str:
        return self._of("system")

    @cached_property
    def prompt(self) -> str:
        """All that users say; of a labelled row everything but the label."""
        if self.example.label is not None:
            return "\n".join(text for _, role, text in self.parts if role != "system")
        return self._of("user")

    @cached_property
    def answer(self) -> str:
        """All that the assistant says, or the document, or the label: what is learnt."""
        if self.example.label is not None:
            return self.example.label
        return self._of("assistant") if isinstance(self.example, Conversation) else self.example.text

    @cached_property
    def is_single_turn(self) -> bool:
        return self.example.label is not None or sum(role == "user" for _, role, _ in self.parts) == 1

    @cached_property
    def answer_words(self) -> list[str]:
        return words(self.answer)

    @cached_property
    def prompt_words(self) -> list[str]:
        return words(self.prompt)


class Check(Protocol):
    """A rule or a family of them at work on one file."""

    def see(self, row: RowView) -> Iterable[Finding]: ...

    def finish(self) -> Iterable[Finding]: ...


class RowCheck:
    """A check that has nothing to say at the end."""

    def finish(self) -> Iterable[Finding]:
        return ()


def words(text: str) -> list[str]:
    """The words of a text in small letters.

    >>> words("Don't say 'A1'!")
    ["don't", 'say', 'a1']
    """
    return _WORD.findall(text.casefold())


def squeezed(text: str) -> str:
    """The text in small letters with single blanks: what two writers of one row have in common."""
    return " ".join(text.casefold().split())
