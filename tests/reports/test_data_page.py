"""The page and the card of a data file say what was found, and nothing in a row becomes markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from planted_faults import Sentences, chat

from phinetune.base.errors import UserError
from phinetune.data.changing.cleaning import CleanOptions
from phinetune.data.changing.versions import clean_file, read_changes
from phinetune.data.checking import check_file
from phinetune.data.histogram import histogram
from phinetune.reports.bars import bars_svg
from phinetune.reports.data_page import comparisons, data_card, headline, refuse_foreign, write_data_page

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_rows_stay_text_on_the_page(tmp_path: Path) -> None:
    rows = [chat(EVIL, EVIL), chat(EVIL, EVIL), {"messages": [{"role": EVIL, "content": "a"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    write_data_page(tmp_path / "a.html", check_file(path))
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert "exact_duplicate" in page


def test_the_page_shows_before_and_after(tmp_path: Path) -> None:
    sentences = Sentences()
    rows = [sentences.row() for _ in range(12)]
    before = check_file(write(tmp_path / "a.jsonl", [*rows, rows[0]]))
    after = check_file(write(tmp_path / "b.jsonl", rows))
    found = {row.name: (row.before, row.after) for row in comparisons(before, after)}
    assert found["sound rows"] == ("13", "12")
    assert found["exact_duplicate"] == ("1", "0")
    write_data_page(tmp_path / "a.html", before, after)
    assert "Before and after cleaning" in (tmp_path / "a.html").read_text("utf-8")


def test_the_headline_says_the_gravest(tmp_path: Path) -> None:
    assert headline(check_file(tmp_path / "none.jsonl"))[1] == "worse"
    good = write(tmp_path / "a.jsonl", [Sentences().row()] * 1)
    assert headline(check_file(good)) == ("1 sound row, 1 warning to look at", "even")
    bad = write(tmp_path / "b.jsonl", [Sentences().row(), {"messages": []}])
    assert headline(check_file(bad)) == ("1 row cannot be trained on; 1 sound row can", "worse")


def test_a_card_says_what_nobody_stated(tmp_path: Path) -> None:
    report = check_file(write(tmp_path / "a.jsonl", [chat("a", "Mail ann@example.org")]))
    card = data_card(report, {"purpose": "a test"}, "abc")
    assert "- **What it is for**: a test" in card
    assert "- **Licence**: not stated" in card
    assert "warning **private_data**, 1" in card
    assert "ann@example.org" not in card
    assert "names of people" in card


def test_a_histogram_is_drawn_whole() -> None:
    bins = histogram([1, 5, 50, 700, 700, 3_000_000])
    assert sum(bin.count for bin in bins) == 6
    root = ElementTree.fromstring(bars_svg(bins, "<Rows> & more"))
    assert len([element for element in root.iter() if element.tag.endswith("rect")]) == len(bins)
    assert histogram([]) == []
    assert sum(bin.count for bin in histogram([10**number for number in range(12)])) == 12
    assert [bin.label for bin in histogram([0, 0])] == ["0"]


def test_the_page_shows_what_a_cleaning_did(tmp_path: Path) -> None:
    sentences = Sentences()
    rows = [sentences.row() for _ in range(12)]
    rows.append(chat("<p>Tea &amp; cake?</p>", "<b>Yes</b>, of course."))
    path = write(tmp_path / "a.jsonl", [*rows, rows[0]])
    made = clean_file(path, tmp_path / "clean", CleanOptions())
    assert made.file is not None
    changes = read_changes(made.file)
    assert changes == made.changes
    write_data_page(tmp_path / "a.html", check_file(path), check_file(made.file), changes)
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "<del>&lt;p&gt;Tea &amp;amp; cake?&lt;/p&gt;</del><ins>Tea &amp; cake?</ins>" in page
    assert "the same row as line 1" in page
    assert read_changes(path) == ()


def test_only_a_page_of_ours_is_written_over(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    assert not refuse_foreign(page)
    write_data_page(page, check_file(write(tmp_path / "a.jsonl", [Sentences().row()])))
    assert refuse_foreign(page)
    page.write_text("<p>My own</p>", "utf-8")
    with pytest.raises(UserError, match="no page of a data file"):
        refuse_foreign(page)
