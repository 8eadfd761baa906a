"""The generated pre-training texts: reproducible, right, and without the demo task's schema."""

from __future__ import annotations

import json
import random
from itertools import islice

import pytest
from demo_text import lists, records, skills, small_world
from demo_text.record_tables import LABELS, PHRASES
from demo_text.words import WordSource

REAL = ("apple", "river", "window", "kettle")
TICKET_KEYS = {"product", "order", "issue", "action", "urgency"}


@pytest.fixture
def words() -> WordSource:
    return WordSource(rng=random.Random(7), real=REAL)


def test_the_same_seed_gives_the_same_documents() -> None:
    first, second = (list(islice(skills.documents(skills.SKILLS, 3, REAL), 200)) for _ in range(2))
    assert first == second
    assert first != list(islice(skills.documents(skills.SKILLS, 4, REAL), 200))


def test_no_field_of_the_demo_task_is_a_field_of_the_generated_records() -> None:
    assert not TICKET_KEYS & (set(PHRASES) | set(LABELS))


def test_repeated_text_equals_what_is_asked_for(words: WordSource) -> None:
    for _ in range(200):
        question, answer = lists.repeat(words)
        assert answer.text in question.text
        assert not question.learn
        assert answer.learn


def test_only_the_repetitions_of_a_block_are_learnt(words: WordSource) -> None:
    for _ in range(50):
        block, rest = lists.repeated_lines(words)
        assert not block.learn
        assert rest.learn
        assert block.text in rest.text


def test_json_answers_parse_and_copy_their_values_from_the_message(words: WordSource) -> None:
    for _ in range(300):
        *before, answer = records.message_to_json(words)
        record = json.loads(answer.text)
        message = "\n".join(turn.text for turn in before).lower()
        for key, value in record.items():
            assert key in message
            assert key in LABELS or value.lower() in message


def test_a_question_on_a_small_world_is_answered_from_its_text(words: WordSource) -> None:
    for make in (small_world.where_is, small_world.facts):
        for _ in range(200):
            question, answer = make(words)
            said = answer.text.removeprefix("The ").removesuffix(" has it.").removesuffix(".")
            assert said in question.text


def test_every_generator_gives_texts(words: WordSource) -> None:
    for make in skills.SKILLS:
        for _ in range(30):
            turns = make(words)
            assert turns
            assert turns[-1].text
            assert any(turn.learn for turn in turns)
