"""The page of answers shows every side, escapes all text, and runs nothing."""

from __future__ import annotations

from phinetune.reports.answers_page import write_answers

ANSWERS = [
    {
        "prompt": [{"role": "user", "content": "<script>alert(1)</script>"}],
        "reference": "yes",
        "base": "no & never",
        "adapter": "yes",
        "formal": "Yes, \ud800 indeed.",
    },
    {
        "prompt": [{"role": "user", "content": "Hi"}],
        "reference": None,
        "base": "a",
        "adapter": "b",
        "formal": "c",
    },
]


def test_a_page_shows_every_side_and_escapes_all_text(tmp_path):
    write_answers(tmp_path / "page.html", "runs/<one>", ["base", "adapter", "formal"], ANSWERS)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "no &amp; never" in page
    assert "runs/&lt;one&gt;" in page
    assert page.count("exact match") == 1
    assert page.count("<h2>reference</h2>") == 1
    assert "default-src 'none'" in page
    for text in ("<h2>base", "<h2>adapter", "<h2>formal"):
        assert page.count(text) == 2
