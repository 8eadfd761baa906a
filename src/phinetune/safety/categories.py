"""The four kinds of harm, how grave each may be, and what a filter found. Plain data.

Categories and severities are those of Azure's and Windows' content moderation: safe, low, medium and high
are 0, 2, 4 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Literal


class Category(StrEnum):
    """A kind of harm."""

    HATE = "hate"
    SEXUAL = "sexual"
    VIOLENCE = "violence"
    SELF_HARM = "self_harm"


class Severity(IntEnum):
    """How grave a text is in one category."""

    SAFE = 0
    LOW = 2
    MEDIUM = 4
    HIGH = 6


def _up_to(severity: Severity) -> dict[Category, Severity]:
    return dict.fromkeys(Category, severity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is done with what is found.

    `annotate` says it and lets the text pass; `block` keeps back text that is graver than allowed or holds
    a term of a block list, and everything when the filter itself fails. The severities are the greatest
    that is allowed; `block_injections` keeps back prompts that try to overrule the instructions.
    """

    mode: Literal["annotate", "block"] = "annotate"
    prompt_max_severity: Mapping[Category, Severity] = field(default_factory=lambda: _up_to(Severity.LOW))
    response_max_severity: Mapping[Category, Severity] = field(default_factory=lambda: _up_to(Severity.LOW))
    blocklists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    block_injections: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found in one text. `fault` says why a filter that failed could not judge it."""

    severities: Mapping[Category, Severity]
    terms: tuple[tuple[str, str], ...] = ()
    injection: str = ""
    fault: str = ""
    is_blocked: bool = False

    @property
    def is_judged(self) -> bool:
        return not self.fault

    def results(self) -> dict[str, object]:
        """In the form of Azure's `content_filter_results`."""
        names = {0: "safe", 2: "low", 4: "medium", 6: "high"}
        found: dict[str, object] = {
            str(category): {"severity": names[int(severity)], "filtered": self.is_blocked and severity > 0}
            for category, severity in self.severities.items()
        }
        if self.terms:
            lists = sorted({name for name, _ in self.terms})
            found["custom_blocklists"] = [{"id": name, "filtered": self.is_blocked} for name in lists]
        if self.injection:
            found["jailbreak"] = {"detected": True, "filtered": self.is_blocked}
        if self.fault:
            found["error"] = {"code": "content_filter_error", "message": self.fault}
        return found
