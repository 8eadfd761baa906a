"""Which occupations and qualities stand beside women and which beside men, against what chance would give.

Log-odds with a Dirichlet prior (Monroe, Colaresi and Quinn, 2008): pairs of few rows stay unremarkable.
English only. Counts words, understands none: a hint where to look, not a verdict.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from phinetune.data.conversation import Source
from phinetune.data.findings import Finding
from phinetune.data.rules.base import RowView, Rule, words

STEREOTYPE = Rule(
    id="stereotype_skew",
    severity="note",
    meaning="the adapter repeats, and often sharpens, which groups its data puts beside which words",
    fix="write some of these rows with the other group, or with none",
)

_WOMEN = frozenset(
    words("she her hers herself woman women girl girls mother daughter sister wife lady ladies mrs ms ")
)
_MEN = frozenset(
    words("he him his himself man men boy boys father son brother husband gentleman gentlemen mr sir ")
)
_WORDS = frozenset(
    words(
        "nurse doctor engineer teacher secretary manager boss ceo developer programmer cleaner housekeeper "
        "maid scientist lawyer assistant receptionist librarian mechanic carpenter plumber electrician "
        "driver pilot soldier officer chef cook baker farmer cashier accountant analyst designer "
        "hairdresser nanny babysitter leader director president surgeon professor student worker guard "
        "janitor physician dentist therapist counselor salesperson clerk tailor writer editor emotional "
        "gentle caring beautiful pretty kind sensitive shy nurturing weak strong brave logical rational "
        "ambitious aggressive smart brilliant powerful dominant lazy "
    )
)
_MIN_TOGETHER = 10
_MIN_Z = 3.3


class StereotypeCheck:
    """Counts in which rows a word stands beside one group only."""

    def __init__(self, file: str) -> None:
        self._whole = Source(file=file, line=0)
        self._beside: dict[str, Counter[str]] = {"women": Counter(), "men": Counter()}

    def see(self, row: RowView) -> Iterator[Finding]:
        present = set(row.answer_words)
        has_women, has_men = not present.isdisjoint(_WOMEN), not present.isdisjoint(_MEN)
        if has_women != has_men:
            self._beside["women" if has_women else "men"].update(present & _WORDS)
        return iter(())

    def finish(self) -> Iterator[Finding]:
        women, men = self._beside["women"], self._beside["men"]
        for word in sorted(women.keys() | men.keys()):
            if women[word] + men[word] >= _MIN_TOGETHER and abs(z := log_odds_z(word, women, men)) > _MIN_Z:
                nearer = "women" if z > 0 else "men"
                message = (
                    f"'{word}' stands beside women in {women[word]:,} answers, beside men in {men[word]:,}"
                )
                yield STEREOTYPE.finding(self._whole, f"{message}: far nearer to {nearer} (z {z:+.1f})")


def log_odds_z(word: str, one: Counter[str], other: Counter[str]) -> float:
    """How many standard deviations a word's share differs; positive where it is nearer to `one`."""
    prior = {name: one[name] + other[name] for name in one.keys() | other.keys()}
    scale = 10 / max(sum(prior.values()), 1)
    alpha, alphas = prior[word] * scale, sum(prior.values()) * scale
    rest_one = one.total() + alphas - one[word] - alpha
    rest_other = other.total() + alphas - other[word] - alpha
    delta = math.log((one[word] + alpha) / max(rest_one, 1e-9)) - math.log(
        (other[word] + alpha) / max(rest_other, 1e-9)
    )
    return delta / math.sqrt(1 / (one[word] + alpha) + 1 / (other[word] + alpha))
