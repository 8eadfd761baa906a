"""Measures of single answers, with the odd cases spelt out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.evaluation.metrics import (
    exact_match,
    json_fields,
    json_object,
    json_valid,
    perplexity,
    token_f1,
)


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("Paris", "Paris", True),
        ("Paris", "\n Paris \t", True),
        ("Paris", "paris", False),
        ("a b", "a  b", False),
        ("", "", True),
        ("", "  ", True),
        ("", "x", False),
    ],
)
def test_exact_match(reference, answer, expected):
    assert exact_match(reference, answer) is expected


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("the cat", "cat", 1.0),
        ("cat sat", "dog ran", 0.0),
        ("cat cat", "cat", 2 / 3),
        ("Oslo, Norway!", "oslo norway", 1.0),
        ("", "", 1.0),
        ("", "anything", 0.0),
        ("anything", "", 0.0),
        ("+", "-", 0.0),
        ("+", " + ", 1.0),
        ("the", "an", 0.0),
        ("«Оса»", "оса", 1.0),
        ("don't", "don’t", 1.0),
        ('{"k":"x","b":"y"}', '{"k":"x","b":"z"}', 3 / 4),
    ],
)
def test_token_f1(reference, answer, expected):
    assert token_f1(reference, answer) == pytest.approx(expected)


@given(st.text(), st.text())
def test_token_f1_is_symmetric_bounded_and_one_for_equal_texts(one, other):
    assert token_f1(one, other) == token_f1(other, one)
    assert 0.0 <= token_f1(one, other) <= 1.0
    assert token_f1(one, one) == 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"a": 1}', True),
        ("[1, 2]", True),
        ("5", True),
        ("", False),
        ("{'a': 1}", False),
        ('```json\n{"a": 1}\n```', False),
        ('{"a": NaN}', False),
        ("[" * 200_000, False),
        ("1" * 5_000, False),
        ('{"a": "\\ud800"}', True),
    ],
)
def test_json_valid(answer, expected):
    assert json_valid(answer) is expected


def test_json_object_is_only_an_object():
    assert json_object('{"a": 1}') == {"a": 1}
    assert json_object("[1]") is None
    assert json_object("nonsense") is None


def test_json_fields_compare_as_json():
    reference = {"n": 1, "yes": True, "list": [1, {"b": 2}], "text": "x", "none": None, "gone": 0}
    answer = '{"yes": 1, "n": 1.0, "list": [1, {"b": 2}], "text": "x ", "none": null, "more": 5}'
    expected = {"n": True, "yes": False, "list": True, "text": False, "none": True, "gone": False}
    assert json_fields(reference, answer) == expected


@pytest.mark.parametrize("answer", ["not json", "[1]", "{}"])
def test_json_fields_of_another_kind_of_answer_are_all_wrong(answer):
    assert json_fields({"a": 1, "b": None}, answer) == {"a": False, "b": False}


def test_nested_true_is_not_one():
    assert json_fields({"a": [True]}, '{"a": [1]}') == {"a": False}


def test_perplexity_is_exponential_and_never_overflows():
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e6) == math.inf
