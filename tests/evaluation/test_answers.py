"""Measures of answers: who counts, and with what weight."""

from __future__ import annotations

import pytest

from phinetune.evaluation.answers import Answered, answer_measures
from phinetune.evaluation.bootstrap import totals


def answered(index: int, reference: str, base: str, adapter: str) -> Answered:
    return Answered(index=index, reference=reference, base=base, adapter=adapter)


def test_examples_without_an_answer_have_no_weight():
    measures = answer_measures([answered(2, "yes", "no", "yes"), answered(4, "no", "no", "no")], 6)
    assert measures["exact_match"].weight_N.tolist() == [0, 0, 1, 0, 1, 0]
    assert totals(measures["exact_match"]) == (0.5, 1.0)


def test_no_answers_give_no_measures():
    assert answer_measures([], 3) == {}


def test_a_field_counts_only_where_the_reference_has_it():
    measures = answer_measures(
        [
            answered(0, '{"city": "Oslo", "year": 1}', "no json", '{"city": "Oslo", "year": 2}'),
            answered(1, '{"city": "Bergen"}', '{"city": "Bergen"}', '{"city": "Oslo"}'),
        ],
        2,
    )
    assert totals(measures["field:city"]) == (0.5, 0.5)
    assert totals(measures["field:year"]) == (0.0, 0.0)
    assert measures["field:year"].weight_N.tolist() == [1, 0]
    assert totals(measures["json_valid"]) == (0.5, 1.0)


@pytest.mark.parametrize("reference", ["[1]", "text", "5", ""])
def test_one_reference_that_is_no_object_takes_the_json_measures_away(reference):
    measures = answer_measures([answered(0, "{}", "", ""), answered(1, reference, "", "")], 2)
    assert set(measures) == {"exact_match", "token_f1"}
