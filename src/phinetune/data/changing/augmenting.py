"""More rows from those there are: prompts with typing errors, in other case, or said otherwise by a model.

Answers stay as they are. New rows stand after the old ones, and the recipe says which they are and how they
were made: nobody shall take them for what people wrote. The model is handed in.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from phinetune.base.errors import SettingsError, nearest
from phinetune.data.changing.splitting import sound_examples
from phinetune.data.changing.writing import refuse_existing, source_record, write_file, write_recipe
from phinetune.data.conversation import Conversation, Example
from phinetune.data.formats.row_forms import ReadOptions

WAYS = ("typos", "case", "paraphrase")
Paraphrase = Callable[[str], str]
_LONG_WORD = re.compile(r"\b[^\W\d_]{4,}\b")


def with_typos(text: str, rng: random.Random) -> str:
    """One or two typing errors in words of four letters and more; codes and numbers stay."""
    places = list(_LONG_WORD.finditer(text))
    for match in sorted(
        rng.sample(places, min(len(places), rng.randint(1, 2))), key=lambda found: -found.start()
    ):
        word, place = match.group(), rng.randrange(1, len(match.group()) - 1)
        swapped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        changed = rng.choice(
            [swapped, word[:place] + word[place + 1 :], word[:place] + word[place] + word[place:]]
        )
        text = text[: match.start()] + changed + text[match.end() :]
    return text


def in_other_case(text: str, rng: random.Random) -> str:
    """In small letters, in capitals, or without the mark at its end."""
    return rng.choice([text.lower(), text.upper(), text.lower().rstrip("?!."), text.rstrip("?!.")])


def augment_file(
    path: Path,
    to: Path,
    ways: tuple[str, ...],
    *,
    share: float,
    seed: int,
    paraphrase: Paraphrase | None = None,
    options: ReadOptions | None = None,
) -> Counter[str]:
    """Write the rows, then for each way new ones from a share of them; returns how many by way.

    Raises `SettingsError` for an unknown way, or for paraphrases without a model.
    """
    for way in ways:
        if way not in WAYS:
            do = (
                f"did you mean {nearest(way, WAYS)}?"
                if nearest(way, WAYS)
                else f"choose among {', '.join(WAYS)}"
            )
            raise SettingsError(f"rows cannot be augmented by '{way}'", where="--way", do=do)
    if "paraphrase" in ways and paraphrase is None:
        raise SettingsError(
            "a paraphrase needs a model", where="--way paraphrase", do="name one: --model NAME"
        )
    if not 0 < share <= 1:
        raise SettingsError(
            "the share lies above 0 and up to 1", where="--share", do="for example --share 0.3"
        )
    refuse_existing(to)
    rng = random.Random(seed)
    rewrites: dict[str, Callable[[str], str]] = {
        "typos": lambda text: with_typos(text, rng),
        "case": lambda text: in_other_case(text, rng),
        "paraphrase": paraphrase or str,
    }
    counts: Counter[str] = Counter()
    num_old = 0

    def rows() -> Iterator[Example]:
        nonlocal num_old
        for example in sound_examples(path, options):
            num_old += 1
            yield example
        for way in ways:
            for example in sound_examples(path, options):
                if rng.random() < share and (made := _rewritten(example, rewrites[way])) is not None:
                    counts[way] += 1
                    yield made

    num_rows = write_file(to, rows())
    recipe: dict[str, Any] = {"made_by": "phinetune data augment", "input": source_record(path), "seed": seed}
    synthetic = {"first_row": num_old + 1, "last_row": num_rows, "rows_by_way": dict(counts), "share": share}
    write_recipe(to, {**recipe, "synthetic": synthetic if counts else None})
    return counts


def _rewritten(example: Example, rewrite: Callable[[str], str]) -> Example | None:
    """The conversation with other prompts, or None where nothing changed."""
    if not isinstance(example, Conversation):
        return None
    messages = tuple(
        replace(message, content=rewrite(message.content)) if message.role == "user" else message
        for message in example.messages
    )
    is_empty = any(not message.content.strip() for message in messages)
    return None if is_empty or messages == example.messages else replace(example, messages=messages)
