"""Measures of one answer against its reference, and which way each measure is better.

Pure text in, numbers out. Knows nothing of models or of how answers were made.
"""

from __future__ import annotations

import json
import math
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
ARTICLES = frozenset({"a", "an", "the"})


def perplexity(loss: float) -> float:
    """e to the mean loss per token; infinite rather than an overflow.

    >>> perplexity(0.0)
    1.0
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def exact_match(reference: str, answer: str) -> bool:
    """Whether both texts are the same once white space at either end is removed; case counts.

    >>> exact_match("Paris", " Paris\\n"), exact_match("Paris", "paris")
    (True, False)
    """
    return reference.strip() == answer.strip()


def token_f1(reference: str, answer: str) -> float:
    """Overlap of words as a number from 0 to 1, in the manner of SQuAD.

    Both texts are lower-cased, apostrophes and the English words a, an, the are removed, and the rest is
    split at white space and punctuation (SQuAD deletes punctuation, which would make compact JSON a single
    word); F1 is the harmonic mean of the shares of shared words, counting repeats. When a
    side has no words left (an empty text, a lone "+"), it is 1 for an exact match and 0 otherwise. In
    languages written without spaces a whole phrase counts as one word.

    >>> token_f1("The cat sat.", "a cat sat down")
    0.8
    """
    expected, given = _words(reference), _words(answer)
    if not expected or not given:
        return float(exact_match(reference, answer))
    num_shared = sum((Counter(expected) & Counter(given)).values())
    return 2 * num_shared / (len(expected) + len(given))


def _words(text: str) -> list[str]:
    bare = text.lower().replace("'", "").replace("\u2019", "")
    spaced = "".join(" " if _is_punctuation(character) else character for character in bare)
    return [word for word in spaced.split() if word not in ARTICLES]


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def json_valid(answer: str) -> bool:
    """Whether the whole answer is one JSON value; NaN and Infinity are not JSON.

    >>> json_valid('{"a": 1}'), json_valid('Sure: {"a": 1}')
    (True, False)
    """
    return _parse(answer) is not _INVALID


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the whole text is, or None."""
    value = _parse(text)
    return value if isinstance(value, dict) else None


def json_fields(reference: Mapping[str, Any], answer: str) -> dict[str, bool]:
    """For each field of the reference object, whether the answer has it with an equal value.

    Values are equal as JSON: order of keys does not matter, 1 equals 1.0, but true is not 1 and "1" is not 1.
    An answer that is not a JSON object has every field wrong. Fields only the answer has are not counted.

    >>> json_fields({"city": "Oslo", "year": 1990}, '{"year": 1990, "city": "Bergen"}')
    {'city': False, 'year': True}
    """
    given = json_object(answer)
    return {
        name: given is not None and name in given and _equal(value, given[name])
        for name, value in reference.items()
    }


_INVALID = object()


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _INVALID


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    # Python holds True == 1; JSON does not.
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
