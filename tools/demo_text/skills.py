"""The table of generated tasks with their weights, and the stream of documents drawn from it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from demo_text import lists, records, small_world
from demo_text.document import Document
from demo_text.words import WordSource

Generator = Callable[[WordSource], Document]

# repetition: what makes copying emerge; skills: what uses it
REPETITION: dict[Generator, float] = {
    lists.repeated_lines: 4,
    lists.repeat: 3,
    lists.pairs_text: 3,
    lists.code_words: 1.5,
    records.text_to_json: 1.5,
}
SKILLS: dict[Generator, float] = {
    lists.repeated_lines: 1,
    lists.repeat: 2,
    lists.pairs_text: 1,
    lists.code_words: 1.5,
    lists.reverse: 0.5,
    lists.sort: 0.3,
    lists.pick: 0.8,
    lists.count: 0.5,
    lists.reformat: 1,
    lists.replace: 0.7,
    lists.spell: 0.4,
    lists.marked: 0.7,
    records.message_to_json: 6,
    records.text_to_json: 2,
    records.json_lookup: 1.2,
    records.find_in_message: 3,
    records.choose_label: 0.8,
    small_world.where_is: 1.5,
    small_world.facts: 1.2,
    small_world.story: 1,
    small_world.introduce: 1,
    small_world.system_rule: 1,
    lambda words: lists.sequence(words.rng): 0.3,
}


def documents(table: dict[Generator, float], seed: int, real: tuple[str, ...]) -> Iterator[Document]:
    """An endless stream, the same for the same seed and word list."""
    words = WordSource(rng=random.Random(seed), real=real)
    makers, weights = list(table), list(table.values())
    while True:
        for maker in words.rng.choices(makers, weights=weights, k=256):
            yield maker(words)
