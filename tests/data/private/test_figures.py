"""How much private data is found, kind by kind, among numbers that are none; replaced, it is gone."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from made_up_private_data import CHECKED, LOOK_ALIKES, PATTERNS
from planted_faults import PRIVATE, SECRETS, Sentences

from phinetune.data.private.finding import Redactor, private_spans
from phinetune.data.private.kinds import NOT_COVERED

EACH = 100


def test_every_kind_is_found_and_little_else() -> None:
    rng, sentences = random.Random(12), Sentences()
    hits: Counter[str] = Counter()
    named: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    texts: list[tuple[str, str]] = []
    for kind, make in (CHECKED | PATTERNS).items():
        texts += [
            (kind, f"{sentences.sentence()} It is {make(rng)}, they say. {sentences.sentence()}")
            for _ in range(EACH)
        ]
    texts += [
        ("", f"{sentences.sentence()} It was {rng.choice(LOOK_ALIKES)(rng)}. {sentences.sentence()}")
        for _ in range(3000)
    ]
    for kind, text in texts:
        found = [span.kind for span in private_spans(text)]
        hits[kind] += kind in found
        for name in found:
            named[name] += 1
            wrong[name] += name != kind
    print(f"\n  {'kind':20} {'recall':>7} {'precision':>10}")
    for kind in CHECKED | PATTERNS:
        print(f"  {kind:20} {hits[kind] / EACH:7.1%} {1 - wrong[kind] / max(named[kind], 1):10.1%}")
    assert len(CHECKED | PATTERNS) >= 20
    assert all(hits[kind] / EACH >= 0.98 for kind in CHECKED)
    assert all(hits[kind] / EACH >= 0.90 for kind in PATTERNS)
    precision = 1 - wrong.total() / named.total()
    print(f"  precision of all: {precision:.1%}")
    assert precision >= 0.95


def test_what_is_not_covered_is_said() -> None:
    assert "names of people" in NOT_COVERED


@given(
    st.lists(st.sampled_from([*PRIVATE, *SECRETS]) | st.text(max_size=12), max_size=6),
    st.sampled_from(["", " ", ", "]),
)
def test_what_was_replaced_is_found_no_more(parts: list[str], between: str) -> None:
    text = between.join(parts)
    redactor = Redactor()
    once = redactor.redacted(text)
    for _ in range(5):
        again = redactor.redacted(once)
        if again == once:
            break
        once = again
    assert private_spans(once) == []


@given(st.text())
def test_no_text_makes_finding_fail(text: str) -> None:
    for span in private_spans(text):
        assert 0 <= span.start < span.end <= len(text)
