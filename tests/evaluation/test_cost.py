"""What answering will take, in time and memory, follows from how many rows the engine keeps alive."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import random_rows, tiny_base

from phinetune.evaluation.cost import (
    StepSeconds,
    answering_of,
    comparison_bytes,
    comparison_seconds,
    nothing_answered,
)
from phinetune.generation import greedy
from phinetune.generation.cache import KeyValueCache
from phinetune.generation.greedy import answer_room, generate_batch
from phinetune.models.memory import Costs

STEP = StepSeconds(first_row=1.0, further_row=0.5)


def test_rows_that_end_make_room_for_the_next(monkeypatch):
    monkeypatch.setattr(greedy, "MAX_ROWS_CPU", 2)
    answering = answering_of(tiny_base(), [(10, 4), (9, 2), (8, 3)], max_new_tokens=8)
    # Adapter: two rows until 4 (the second ends at 2, the third begins), then one row until 5.
    # Base, half-way to 8: 6, 5, 5: two rows until 6, then one row until 10.
    of_adapter, of_base = 4 * 1.5 + 1 * 1.0, 6 * 1.5 + 4 * 1.0
    seconds = comparison_seconds(answering, 0, 0.0, (STEP, STEP))
    assert seconds == pytest.approx(of_adapter + of_base)
    reading = comparison_seconds(answering, 100, 0.1, nothing_answered())
    assert reading == pytest.approx(2 * (100 + 27) * 0.1)


def test_nothing_to_answer_takes_only_the_scores():
    answering = answering_of(tiny_base(), [], max_new_tokens=0)
    assert comparison_seconds(answering, 50, 0.1, nothing_answered()) == pytest.approx(10.0)


def test_the_caches_of_the_engine_are_no_larger_than_counted(monkeypatch):
    largest = {"slots": 0, "capacity": 0}
    ensure = KeyValueCache.ensure

    def noted(self, num_slots, capacity):
        ensure(self, num_slots, capacity)
        largest["slots"] = max(largest["slots"], self.num_slots)
        largest["capacity"] = max(largest["capacity"], self.capacity)

    monkeypatch.setattr(KeyValueCache, "ensure", noted)
    base = tiny_base()
    prompts = [[3 + row % 5] * (4 + 2 * row) for row in range(9)]
    generate_batch(base, prompts, max_new_tokens=6, stop_ids=())
    per_token = greedy._cache_bytes_per_token(base)
    prefixes = sum(map(len, prompts)) * per_token
    room = answer_room(base, [len(prompt) for prompt in prompts], 6)
    assert room.num_rows == 9
    assert room.cache_bytes == largest["slots"] * largest["capacity"] * per_token + prefixes


def test_a_fuller_cache_takes_more_memory():
    base = tiny_base()
    costs = Costs.of(base, 0.0, num_adapter_parameters=0, num_moments=0)
    few, many = (answering_of(base, [(200, 9)] * number, max_new_tokens=64) for number in (2, 40))
    rows = random_rows([5])
    assert few.room
    assert many.room
    assert many.room.cache_bytes > 10 * few.room.cache_bytes
    assert comparison_bytes(costs, many, rows) > comparison_bytes(costs, few, rows)
    assert comparison_bytes(costs, replace(many, room=None), rows) < comparison_bytes(costs, few, rows)
