"""The classes of a classification: their names in order, how often each occurs, and what each weighs.

Names come from the training rows, sorted, or from a file: a JSON list, a JSON object of name and weight, or
lines of text. Knows nothing of tokens or models.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phinetune.base.errors import DataError, SettingsError, nearest
from phinetune.data.conversation import Conversation, Example

NUM_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Class i has the name `names[i]` and stood `counts[i]` times in the training rows.

    `weights` scale the loss of each class; their mean over the training rows is 1. None: all the same.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    # Whether the training rows are chats: a bare text is then read as a user's turn.
    reads_chats: bool = False

    def number(self, name: str) -> int:
        """The place of a name. Raises `ValueError` for one that is not there."""
        return self.names.index(name)


def classes_of(
    examples: Sequence[Example], file: Path | None = None, weighting: Literal["none", "balanced"] = "none"
) -> Classes:
    """The classes of training examples. `balanced` weighs each class by the inverse of its count.

    Raises `DataError` for rows without label, for one class only, and for labels that the file lacks.

    >>> from phinetune.data.conversation import PlainText, Source
    >>> rows = [PlainText(text=x, source=Source(file="x", line=1), label=x) for x in ("b", "a", "b")]
    >>> classes_of(rows, weighting="balanced")
    Classes(names=('a', 'b'), counts=(1, 2), weights=(1.5, 0.75), reads_chats=False)
    """
    require_labels(examples)
    found = Counter(str(example.label) for example in examples)
    given = _read(file) if file else dict.fromkeys(sorted(found), 1.0)
    if len(given) < 2:
        raise DataError(
            "a classification needs at least two classes",
            where=str(file) if file else examples[0].source.file,
            why=f"every label is '{next(iter(given), '')}'",
            do="check the labels",
        )
    names = tuple(given)
    check_labels(examples, names, str(file) if file else "the training rows")
    counts = tuple(found.get(name, 0) for name in names)
    reads_chats = all(isinstance(example, Conversation) for example in examples)
    weights: list[float] = list(given.values())
    if weighting == "balanced":
        if len(set(weights)) > 1:
            raise SettingsError(
                "class_weights: balanced and weights in the labels file are in conflict",
                where=str(file),
                do="write class_weights: none, or names without weights into the file",
            )
        weights = [1 / count if count else 0.0 for count in counts]
    if len({weight for weight, count in zip(weights, counts, strict=True) if count}) == 1:
        return Classes(names=names, counts=counts, reads_chats=reads_chats)
    mean = sum(weight * count for weight, count in zip(weights, counts, strict=True)) / sum(counts)
    return Classes(
        names=names,
        counts=counts,
        weights=tuple(weight / mean for weight in weights),
        reads_chats=reads_chats,
    )


def require_labels(examples: Sequence[Example]) -> None:
    """Raise `DataError` naming the rows without a label."""
    bare = [example.source for example in examples if example.label is None]
    if bare:
        raise DataError(
            f"{len(bare):,} of {len(examples):,} rows have no label",
            where=", ".join(map(str, bare[:NUM_SHOWN])) + (" …" if len(bare) > NUM_SHOWN else ""),
            why="task: classification learns the label of each row",
            do='write "label" beside "text" or "messages", or another task',
        )


def check_labels(examples: Sequence[Example], names: Sequence[str], known_from: str) -> None:
    """Raise `DataError` naming the rows whose label is none of the names."""
    known = set(names)
    strange = [example for example in examples if example.label not in known]
    if strange:
        label = str(strange[0].label)
        near = nearest(label, names)
        raise DataError(
            f"{len(strange):,} rows have labels that {known_from} do not have",
            where=", ".join(str(example.source) for example in strange[:NUM_SHOWN]),
            why=f"the first is '{label}'" + (f"; the nearest known one is '{near}'" if near else ""),
            do="correct the labels, or name every class in a labels_file",
        )


def _read(file: Path) -> dict[str, float]:
    """Names and weights of a labels file, in its order."""
    if not file.is_file():
        raise SettingsError("there is no such labels file", where=str(file), do="check labels_file")
    text = file.read_text(encoding="utf-8-sig")
    names: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if file.suffix.lower() == ".json":
        try:
            names = json.loads(text)
        except ValueError as error:
            raise SettingsError("the labels file is not JSON", where=str(file), why=str(error)) from None
    pairs = list(names.items()) if isinstance(names, dict) else [(name, 1.0) for name in names or ()]
    sound = [
        (name, float(weight))
        for name, weight in pairs
        if isinstance(name, str) and isinstance(weight, int | float) and 0 <= weight < math.inf
    ]
    if len(sound) < len(pairs) or len(dict(sound)) < len(pairs) or not isinstance(names, list | dict):
        raise SettingsError(
            "the labels file does not hold names",
            where=str(file),
            why="each class must stand there once, as text, and a weight must be a number of 0 or more",
            do='write one name per line, or as JSON ["a", "b"] or {"a": 1.0, "b": 2.5}',
        )
    return dict(sound)
