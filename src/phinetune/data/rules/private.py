"""Rows that hold private data or secrets. What is found is named by its kind, never shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from phinetune.data.findings import Finding
from phinetune.data.private.finding import private_spans
from phinetune.data.rules.base import RowCheck, RowView, Rule

PRIVATE = Rule(
    id="private_data",
    severity="warning",
    meaning="a model can be made to give out what it was trained on: addresses, numbers, accounts",
    fix="replace it: phinetune data clean writes [EMAIL_1] and the like; names of people are not covered",
    can_clean="a placeholder of its kind is written, one for each value",
)
SECRET = Rule(
    id="secret",
    severity="warning",
    meaning="keys and passwords in training data are given away with the adapter",
    fix="take the key out of use, then replace it: phinetune data clean",
    can_clean="a placeholder of its kind is written, one for each value",
)


class PrivateCheck(RowCheck):
    """One finding for each turn and rule, naming all kinds in it."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def see(self, row: RowView) -> Iterator[Finding]:
        for field, _, text in row.parts:
            spans = private_spans(text)
            if not spans:
                continue
            self.kinds.update(span.kind for span in spans)
            for rule, is_secret in ((PRIVATE, False), (SECRET, True)):
                kinds = Counter(span.kind for span in spans if span.is_secret == is_secret)
                if kinds:
                    named = ", ".join(
                        f"{kind} × {count}" if count > 1 else kind for kind, count in kinds.items()
                    )
                    yield rule.finding(row.source, f"holds {named}", field=field)
