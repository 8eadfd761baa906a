"""No rows, however odd, make a rule fail, hang or say what cannot be printed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_faults import BOILERPLATE, FOREIGN, HTML, MOJIBAKE, PRIVATE, SECRETS, chat

from phinetune.data.checking import CheckOptions, check_file
from phinetune.data.findings import EXCERPT_CHARS
from phinetune.data.rules.base import words
from phinetune.data.rules.catalog import RULES
from phinetune.data.rules.duplicates import is_respelt, loosened
from phinetune.data.rules.encoding import repaired
from phinetune.data.rules.markup import without_markup

PIECES = [
    *MOJIBAKE,
    *HTML,
    *BOILERPLATE,
    *FOREIGN,
    *PRIVATE,
    *SECRETS,
    "```",
    "\x1b[2J",
    "\u202e",
    "Joy",
    "joy",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=15), max_size=5).map("".join)
ROWS = st.builds(chat, TEXTS, TEXTS) | st.builds(lambda text: {"text": text}, TEXTS)


@given(st.lists(ROWS, max_size=8), st.booleans())
def test_no_rows_make_a_rule_fail(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], with_test: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    test = path.with_name("odd-test.jsonl")
    test.write_text(path.read_text("utf-8") + json.dumps(chat("Why?", "So.")) + "\n", "utf-8")
    options = CheckOptions(
        test_file=test if with_test else None,
        judge=lambda text: "hate" * (len(text) > 40),
        loss_of=lambda row: 1.0,
    )
    report = check_file(path, options)
    assert report.counts.keys() <= RULES.keys()
    for finding in report.findings:
        assert len(finding.excerpt) <= EXCERPT_CHARS
        assert finding.excerpt.isprintable()
        assert finding.message
        assert finding.fix


@given(TEXTS, TEXTS)
def test_repairs_take_any_text(one: str, other: str) -> None:
    for repair in (repaired, without_markup, loosened):
        assert isinstance(repair(one), str)
    assert is_respelt(one, one) or not words(one)
    assert is_respelt(one, other) == is_respelt(other, one)


def test_long_texts_take_no_longer_than_their_length(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "long.jsonl"
    texts = [
        "<" * 50_000,
        "&" * 50_000,
        "a@" * 30_000,
        "1 " * 40_000,
        "Ã" * 50_000,
        "`" * 50_000,
        "I'm " * 20_000,
    ]
    texts += [
        "eyJ" * 20_000,
        "a.b-" * 20_000 + "@",
        "xoxb-" + "1" * 50_000,
        "key=" * 20_000,
        "2001:" * 20_000,
    ]
    path.write_text("".join(json.dumps(chat("a", text)) + "\n" for text in texts), "utf-8")
    assert check_file(path).num_examples == len(texts)
