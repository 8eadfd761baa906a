"""The content filter: judge prompts and answers, and let a streamed answer out only after it was judged.

    text --classifier, block lists, phrases--> Verdict --policy--> out, or kept back

The classifier is the bundled linear one or any other that gives severities. Knows nothing of models that
answer, of HTTP or of files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, Protocol

from phinetune.safety.categories import Category, Policy, Severity, Verdict
from phinetune.safety.folding import fold
from phinetune.safety.injections import injection_in
from phinetune.safety.linear import bundled

# Folded characters of a streamed answer that are judged together: about 64 tokens. One chunk is always
# held back, so that what begins at the end of one is judged whole.
CHUNK_CHARACTERS = 256

_NOTHING = dict.fromkeys(Category, Severity.SAFE)
Side = Literal["prompt", "response"]


class Classifier(Protocol):
    """Anything that says how grave a text is."""

    def severities(self, text: str) -> Mapping[Category, Severity]: ...


class ContentFilter:
    """Judges by a classifier, block lists and phrases, and decides by a policy.

    >>> ContentFilter(Policy(mode="block", blocklists={"names": ("acme",)})).prompt("About ACME").is_blocked
    True
    """

    def __init__(self, policy: Policy | None = None, classifier: Classifier | None = None) -> None:
        self.policy = policy or Policy()
        self._classifier = classifier
        self._terms = {
            name: [(term, _pattern(term)) for term in terms] for name, terms in self.policy.blocklists.items()
        }
        longest = max(
            (len(fold(term)) for terms in self.policy.blocklists.values() for term in terms), default=0
        )
        self.chunk_characters = max(CHUNK_CHARACTERS, 2 * longest)

    def prompt(self, text: str) -> Verdict:
        """The verdict on what is asked."""
        return self._judged(text, "prompt")

    def response(self, text: str) -> Verdict:
        """The verdict on an answer, or on a part of one."""
        return self._judged(text, "response")

    def stream(self) -> FilteredStream:
        """A gate for an answer that comes in pieces."""
        return FilteredStream(self)

    def _judged(self, text: str, side: Side) -> Verdict:
        """A filter that fails keeps everything back in the mode `block`, and says so in any mode."""
        is_blocking = self.policy.mode == "block"
        try:
            severities = dict((self._classifier or bundled()).severities(text))
            terms = tuple(self._terms_in(text))
            injection = injection_in(text) if side == "prompt" else ""
        except Exception as error:
            return Verdict(
                severities=_NOTHING, fault=f"{type(error).__name__}: {error}", is_blocked=is_blocking
            )
        policy = self.policy
        allowed = policy.prompt_max_severity if side == "prompt" else policy.response_max_severity
        is_too_grave = any(severity > allowed[category] for category, severity in severities.items())
        is_refused = is_too_grave or bool(terms) or (policy.block_injections and bool(injection))
        return Verdict(
            severities=severities, terms=terms, injection=injection, is_blocked=is_blocking and is_refused
        )

    def _terms_in(self, text: str) -> list[tuple[str, str]]:
        folded = fold(text)
        return [
            (name, term)
            for name, terms in self._terms.items()
            for term, pattern in terms
            if pattern.search(folded)
        ]


class FilteredStream:
    """Lets out what was judged together with what follows it; nothing more once something is blocked.

    In the mode `annotate` pieces pass at once, and `verdict` is that of the whole answer at its end.
    """

    def __init__(self, content_filter: ContentFilter) -> None:
        self._filter = content_filter
        self._is_holding = content_filter.policy.mode == "block"
        self._held = ""  # judged with what came before it, not yet with what follows
        self._chunk = ""
        self._before = ""  # the last character that left: a term begins at the beginning of a word
        self._whole = ""
        self.verdict = Verdict(severities=_NOTHING)

    def push(self, piece: str) -> str:
        """What may be shown now."""
        if not self._is_holding:
            self._whole += piece
            return piece
        shown = ""
        for char in piece:
            if self.is_closed:
                break
            self._chunk += char
            if len(self._chunk) % self._filter.chunk_characters == 0 and self._is_chunk_full():
                shown += self._judge()
        return shown

    def finish(self) -> str:
        """What is left, when the answer has ended and nothing in it is blocked."""
        if not self._is_holding:
            self.verdict = self._filter.response(self._whole)
            return ""
        shown = "" if self.is_closed else self._judge()
        rest, self._held = self._held, ""
        return shown + rest

    @property
    def is_closed(self) -> bool:
        """Whether something was blocked: nothing more leaves."""
        return self.verdict.is_blocked

    def _is_chunk_full(self) -> bool:
        return len(fold(self._chunk)) >= self._filter.chunk_characters

    def _judge(self) -> str:
        """Judge the chunk with the held one before it; the held one may leave."""
        verdict = self._filter.response(self._before + self._held + self._chunk)
        self.verdict = _gravest(self.verdict, verdict)
        if verdict.is_blocked:
            self._held = self._chunk = ""
            return ""
        shown, self._held, self._chunk = self._held, self._chunk, ""
        self._before = shown[-1:] or self._before
        return shown


def _gravest(one: Verdict, other: Verdict) -> Verdict:
    return Verdict(
        severities={
            category: max(one.severities[category], other.severities[category]) for category in Category
        },
        terms=tuple(dict.fromkeys((*one.terms, *other.terms))),
        fault=one.fault or other.fault,
        is_blocked=one.is_blocked or other.is_blocked,
    )


def _pattern(term: str) -> re.Pattern[str]:
    """A term as whole words of the folded text, with any white space between them."""
    words = r"\s+".join(re.escape(word) for word in fold(term).split())
    return re.compile(rf"(?<!\w){words}(?!\w)")
