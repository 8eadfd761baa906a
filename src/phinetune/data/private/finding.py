"""Find private data in a text, and replace it by placeholders that say its kind. Knows nothing of rows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from phinetune.data.private.checksums import bare
from phinetune.data.private.kinds import KINDS, Kind

_DIGIT = re.compile(r"\d")  # every key and number holds one
_LONG_NUMBER = re.compile(r"\d[^A-Za-z]{0,3}\d[^A-Za-z]{0,3}\d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One piece of private data: `text[start:end]`."""

    kind: str
    placeholder: str
    start: int
    end: int
    is_secret: bool = False


def private_spans(text: str, kinds: Iterable[Kind] = KINDS) -> list[Span]:
    """What is found, in order; where two kinds overlap the earlier of `KINDS` stands.

    >>> [(span.kind, span.start) for span in private_spans("Mail ann@example.org or call +44 20 7946 0958")]
    [('email', 5), ('phone', 29)]
    """
    has_digits = _LONG_NUMBER.search(text) is not None
    has_at = "@" in text
    if not (has_at or "-----" in text or _DIGIT.search(text)):
        return []
    found: list[Span] = []
    for kind in kinds:
        if not _may_hold(text, kind, has_digits, has_at):
            continue
        for match in kind.pattern.finditer(text):
            start, end = match.span()
            is_free = all(end <= span.start or start >= span.end for span in found)
            if is_free and kind.accepts(text, start, match.group()):
                found.append(
                    Span(
                        kind=kind.name,
                        placeholder=kind.placeholder,
                        start=start,
                        end=end,
                        is_secret=kind.is_secret,
                    )
                )
    return sorted(found, key=lambda span: span.start)


def _may_hold(text: str, kind: Kind, has_digits: bool, has_at: bool) -> bool:
    if isinstance(kind.needs, tuple):
        return any(part in text for part in kind.needs)
    if kind.needs == "@":
        return has_at
    if kind.needs == "digits":
        return has_digits
    return kind.needs in text and (has_digits or has_at)


class Redactor:
    """Gives each value one placeholder: the same address is `[EMAIL_1]` in every row.

    >>> redactor = Redactor()
    >>> redactor.redacted("ann@example.org, bob@example.org, ANN@example.org")
    '[EMAIL_1], [EMAIL_2], [EMAIL_1]'
    """

    def __init__(self) -> None:
        self._numbers: dict[str, dict[str, int]] = {}

    def redacted(self, text: str, *, is_secret: bool | None = None) -> str:
        """The text with every piece of private data replaced; only secrets, or all but secrets, if wanted."""
        parts, at = [], 0
        for span in private_spans(text):
            if is_secret is not None and span.is_secret != is_secret:
                continue
            parts += [text[at : span.start], self._placeholder(span.placeholder, text[span.start : span.end])]
            at = span.end
        return "".join([*parts, text[at:]]) if parts else text

    def _placeholder(self, name: str, value: str) -> str:
        key = value.casefold() if name == "EMAIL" else bare(value).casefold() or value
        numbers = self._numbers.setdefault(name, {})
        return f"[{name}_{numbers.setdefault(key, len(numbers) + 1)}]"

    @property
    def counts(self) -> dict[str, int]:
        """How many different values were replaced, by placeholder."""
        return {name: len(numbers) for name, numbers in sorted(self._numbers.items())}
