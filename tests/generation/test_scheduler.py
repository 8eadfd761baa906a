"""The scheduler: rows that decode come first, the rest of the budget goes to prompts, oldest first."""

from __future__ import annotations

import pytest

from phinetune.generation.request import Request, Row, State
from phinetune.generation.sampling import Dice
from phinetune.generation.scheduler import chunks


def row(prompt_length, *, num_cached=0, num_tokens=0):
    made = Row(number=0, request=Request(prompt=(1,) * prompt_length, max_new_tokens=9), dice=Dice(0))
    made.num_cached, made.tokens = num_cached, [2] * num_tokens
    return made


def test_rows_that_decode_come_first_and_prompts_share_what_is_left():
    old, new = row(10, num_cached=4), row(10)
    decodes = row(3, num_cached=3, num_tokens=1)
    assert chunks([old, decodes, new], 9) == [(decodes, 1), (new, 2), (old, 6)]


def test_a_prompt_moves_on_even_when_decoding_rows_fill_the_budget():
    decodes = [row(3, num_cached=3, num_tokens=1) for _ in range(4)]
    reads = row(10)
    assert chunks([*decodes, reads], 4) == [*((one, 1) for one in decodes), (reads, 1)]


def test_ids_run_over_the_border_of_prompt_and_answer():
    one = row(3, num_tokens=2)
    assert [list(one.ids(first, 2)) for first in range(4)] == [[1, 1], [1, 1], [1, 2], [2, 2]]


def test_a_life_has_no_way_back():
    one = row(3)
    one.become(State.RUNNING)
    one.become(State.FINISHED, "stop")
    assert one.is_over
    for state in State:
        with pytest.raises(ValueError, match="cannot go from finished"):
            one.become(state)
