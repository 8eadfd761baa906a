"""Nearly equal texts are found, others are not; judged by likeness counted plainly, with sets."""

from __future__ import annotations

import random

import numpy as np
from planted_faults import Sentences

from phinetune.data.groups import Groups
from phinetune.data.near import NearIndex, likeness

NUM_TEXTS = 1500


def runs_of_five(text: str) -> set[str]:
    return {text[place : place + 5] for place in range(len(text) - 4)}


def plain_likeness(one: tuple[str, str], other: tuple[str, str]) -> float:
    ones, others = (runs_of_five(prompt) | runs_of_five(answer) for prompt, answer in (one, other))
    return len(ones & others) / len(ones | others)


def planted(rng: random.Random) -> tuple[list[tuple[str, str]], list[tuple[int, int]]]:
    """Texts, and pairs of them of which the second is the first with one to twelve words exchanged."""
    sentences = Sentences(rng)
    texts = [(sentences.question(), sentences.answer()) for _ in range(NUM_TEXTS)]
    pairs = []
    for number in range(NUM_TEXTS):
        words = texts[number][1].split()
        for place in rng.sample(range(len(words)), rng.randint(1, 12)):
            words[place] = "".join(rng.choice("abcdefghij") for _ in words[place])
        pairs.append((number, len(texts)))
        texts.append((texts[number][0], " ".join(words)))
    return texts, pairs


def test_the_promised_share_of_near_duplicates_is_found() -> None:
    texts, pairs = planted(random.Random(3))
    with NearIndex() as index:
        for prompt, answer in texts:
            index.add(prompt, answer)
        found = list(index.pairs())
    groups = Groups(len(texts))
    for one, other in found:
        groups.join(one, other)
    alike = [pair for pair in pairs if plain_likeness(texts[pair[0]], texts[pair[1]]) >= 0.8]
    hits = sum(groups.first(one) == groups.first(other) for one, other in alike)
    right = sum(plain_likeness(texts[one], texts[other]) >= 0.8 for one, other in found)
    recall, precision = hits / len(alike), right / len(found)
    print(
        f"\nnear-duplicates: recall {recall:.2%} of {len(alike)}, precision {precision:.2%} of {len(found)}"
    )
    assert 300 < len(alike) < NUM_TEXTS - 300
    assert recall >= 0.95
    assert precision >= 0.98


def test_likeness_is_that_of_plain_sets() -> None:
    texts, pairs = planted(random.Random(4))
    for one, other in pairs[:200]:
        assert abs(likeness(texts[one], texts[other]) - plain_likeness(texts[one], texts[other])) < 1e-9


def test_a_guard_keeps_texts_apart_and_others_may_be_left_out() -> None:
    text = "twelve words of one text that stands here more than only once"
    with NearIndex() as index:
        for guard in (1, 2, 1, 2):
            index.add(text, text, guard=guard)
        assert sorted(index.pairs()) == [(0, 2), (1, 3)]
        assert sorted(index.pairs(np.array([True, True, False, True]))) == [(1, 3)]
        assert index.text(3) == (text, text)


def test_half_characters_and_empty_texts_are_taken_in() -> None:
    with NearIndex() as index:
        for text in ("", "\ud800 half", "", "\ud800 half"):
            index.add(text, "")
        assert {(one, other) for one, other in index.pairs()} <= {(0, 2), (1, 3)}
        assert index.text(1) == ("\ud800 half", "")
