"""The bundled demo data set: reproducible, honest between train and test, and true to its messages."""

from __future__ import annotations

import json
import re
from typing import Any

import make_demo_data
import pytest
from demo_task.phrases import ACTIONS, ISSUES, ORDERS, URGENCIES, Clauses

KEYS = ["product", "order", "issue", "action", "urgency"]


def tickets(split: str) -> list[dict[str, str]]:
    return [json.loads(row["messages"][-1]["content"]) for row in make_demo_data.make(split)]


def messages(split: str) -> list[str]:
    return [row["messages"][1]["content"] for row in make_demo_data.make(split)]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def all_clauses() -> list[Clauses]:
    return [*ISSUES.values(), *ACTIONS.values(), *URGENCIES.values(), ORDERS]


@pytest.mark.parametrize(("split", "count"), [("train", 2000), ("test", 200)])
def test_the_committed_files_are_what_the_tool_makes(split: str, count: int) -> None:
    text = (make_demo_data.OUT / f"{split}.json").read_text("utf-8")
    assert text == make_demo_data.lines(make_demo_data.make(split))
    assert text.count("\n") == count


def test_no_product_word_of_the_test_rows_occurs_in_training_products() -> None:
    seen = set().union(*(words(ticket["product"]) for ticket in tickets("train")))
    unseen = set().union(*(words(ticket["product"]) for ticket in tickets("test")))
    assert len(unseen) > 200
    assert not seen & unseen


def test_no_order_number_of_the_test_rows_occurs_in_training() -> None:
    assert not {t["order"] for t in tickets("train")} & {t["order"] for t in tickets("test")}


def test_no_clause_of_the_test_rows_occurs_in_a_training_message() -> None:
    train = "\n".join(messages("train")).lower()
    for clauses in all_clauses():
        for clause in filter(None, clauses.test):
            # around the product or number, which differ anyway
            pattern = re.escape(clause.lower()).replace(r"\{p\}", r"[\w ]+").replace(r"\{o\}", r"\d+")
            assert not re.search(rf"\b{pattern}(?!\w)", train), clause


def test_every_ticket_has_the_same_keys_in_the_same_order_and_one_line_of_compact_json() -> None:
    for row in make_demo_data.make("train") + make_demo_data.make("test"):
        answer = row["messages"][-1]["content"]
        ticket: dict[str, Any] = json.loads(answer)
        assert list(ticket) == KEYS
        assert answer == json.dumps(ticket, separators=(",", ":"))


def test_product_and_order_are_copied_from_the_message() -> None:
    for split in ("train", "test"):
        for ticket, message in zip(tickets(split), messages(split), strict=True):
            assert ticket["product"] in message
            assert ticket["order"] in message


def test_one_wording_never_means_two_things() -> None:
    for table in (ISSUES, ACTIONS, URGENCIES):
        said = [clause for clauses in table.values() for clause in (*clauses.train, *clauses.test) if clause]
        assert len(said) == len(set(said))


def test_no_product_comes_twice_and_training_has_thousands_of_words() -> None:
    products = [ticket["product"] for ticket in tickets("train")]
    assert len(set(products)) == len(products)
    assert len(set().union(*map(words, products))) > 1500
