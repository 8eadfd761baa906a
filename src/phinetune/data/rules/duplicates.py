"""Rows that stand twice, nearly twice, or contradict each other; and rows that leak from a test set.

Rows whose numbers differ are never near-duplicates, nor are those with different short answers: `12 + 5` and
`12 + 6` look alike and are two examples.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from phinetune.data.conversation import Source
from phinetune.data.findings import Finding
from phinetune.data.groups import Groups
from phinetune.data.near import NearIndex
from phinetune.data.rules.balance import is_like_label, label_key
from phinetune.data.rules.base import RowView, Rule, squeezed, words

DUPLICATE = Rule(
    id="exact_duplicate",
    severity="warning",
    meaning="a row that stands n times counts n times, and is learnt by heart",
    fix="keep one of them: phinetune data clean",
    can_clean="the first is kept",
)
NEAR_DUPLICATE = Rule(
    id="near_duplicate",
    severity="warning",
    meaning="rows that share four fifths of their text add little but memorised sentences",
    fix="keep the best of each group: phinetune data clean",
    can_clean="the best of each group is kept: the most complete answer, without other faults",
)
CONFLICT = Rule(
    id="conflicting_answers",
    severity="warning",
    meaning="one prompt with two different labels: at best one of them is right",
    fix="decide which answer is right and drop the others",
    can_clean="the later ones are dropped, only where asked for: --rule conflicting_answers",
)
SEVERAL_ANSWERS = Rule(
    id="several_answers",
    severity="note",
    meaning="one prompt with several longer answers: variety if meant, noise if not",
    fix="keep them if all are good; else keep the best",
)
LEAK = Rule(
    id="leak_row",
    severity="warning",
    meaning="a test row that was trained on proves nothing: its result is memory",
    fix="drop it from the training set: phinetune data clean --test FILE; or split anew",
    can_clean="with --test the training row is dropped",
)

_NUMBER = re.compile(r"\d+")
_DROPPED = re.compile(r"[?!;:\"“”„«»()]|(?<!\d)[.,]|[.,](?!\d)|(?<!\w)['’]|['’](?!\w)")
_SMALL_WORDS = words(
    "a an the of to in on at is are was for and or do does please can could you me i my your"
)
_MIN_TYPO_LENGTH = 4


def loosened(text: str) -> str:
    """A prompt without case, accents, blanks and closing marks; what may change its meaning stays.

    >>> loosened("  What is the Café?") == loosened("what is the cafe")
    True
    """
    text = squeezed(text)
    if not text.isascii():
        text = "".join(
            char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char)
        )
    return " ".join(_DROPPED.sub("", text).split())


def key_of(*texts: str) -> int:
    """64 bits that stand for texts."""
    joined = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def row_key(row: RowView) -> int:
    """64 bits that stand for a whole row, whatever its case and blanks."""
    return key_of(*(f"{role}\1{squeezed(text)}" for _, role, text in row.parts))


def near_guard(row: RowView) -> int:
    """What near-duplicates must share: system message, numbers, and the answer where it is short."""
    answer = label_key(row.answer) if is_like_label(row.answer.strip()) else ""
    numbers = " ".join([*_NUMBER.findall(row.prompt), "|", *_NUMBER.findall(row.answer)])
    return zlib.crc32(f"{squeezed(row.system)}\0{numbers}\0{answer}".encode("utf-8", "surrogatepass"))


def prompt_guard(row: RowView) -> int:
    """What near-equal prompts must share."""
    numbers = " ".join(_NUMBER.findall(row.prompt))
    return zlib.crc32(f"{squeezed(row.system)}\0{numbers}".encode("utf-8", "surrogatepass"))


class DuplicateCheck:
    """Remembers some 350 bytes of each row, and its text in a temporary file.

    `test_rows` are rows of a test set: what is like one of them is a leak.
    """

    def __init__(self, file: str, test_rows: Iterable[RowView] = ()) -> None:
        self._file = file
        self._index = NearIndex()
        self._first_line: dict[int, int] = {}  # by the key of a row; negative in the test set
        self._lines = array("q")  # of the rows in the index; those of the test set are negative
        self._test_file = ""
        self._conflicts = _Conflicts(file)
        self.num_exact = self.num_near = 0
        for row in test_rows:
            self._test_file = row.source.file
            self._first_line.setdefault(row_key(row), -row.source.line)
            self._take(row, -row.source.line)

    def see(self, row: RowView) -> Iterator[Finding]:
        key = row_key(row)
        first = self._first_line.get(key)
        if first is None:
            self._first_line[key] = row.source.line
            self._conflicts.see(row, self._take(row, row.source.line))
        elif first < 0:
            yield LEAK.finding(
                row.source, f"the row is row {self._test_file}:{-first} of the test set", seen=row.answer
            )
        else:
            self.num_exact += 1
            yield DUPLICATE.finding(
                row.source, f"the same row as line {first}", seen=row.prompt or row.answer
            )

    def _take(self, row: RowView, line: int) -> int:
        self._lines.append(line)
        prompt, answer = squeezed(row.prompt), squeezed(row.answer)
        return self._index.add(prompt, answer, guard=near_guard(row), prompt_guard=prompt_guard(row))

    def finish(self) -> Iterator[Finding]:
        groups = Groups(len(self._index))
        for one, other in self._index.pairs():
            groups.join(one, other)
        for first, *others in groups.all():
            # Rows of a test set come first: a group that holds one begins with it.
            is_leak = self._lines[first] < 0
            for number in others:
                if self._lines[number] >= 0:
                    yield self._alike(number, first, is_leak)
        yield from self._conflicts.finish(self._index, groups)
        self.close()

    def _alike(self, number: int, first: int, is_leak: bool) -> Finding:
        source = Source(file=self._file, line=self._lines[number])
        seen = "".join(self._index.text(number))
        if is_leak:
            place = f"{self._test_file}:{-self._lines[first]}"
            return LEAK.finding(source, f"nearly the row {place} of the test set", seen=seen)
        self.num_near += 1
        return NEAR_DUPLICATE.finding(source, f"nearly the same row as line {self._lines[first]}", seen=seen)

    def close(self) -> None:
        """Let the temporary file of the texts go."""
        self._index.close()


class _Conflicts:
    """Prompts of one turn with different answers: equal but for case and marks, or but for a misspelling."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._prompts, self._answers = array("Q"), array("Q")
        self._lines, self._numbers = array("q"), array("q")
        self._are_labels = array("b")
        self._place = array("q")  # by number in the index, -1 where it is no prompt of one turn

    def see(self, row: RowView, number: int) -> None:
        if not row.is_single_turn or not row.prompt.strip():
            return
        self._place.extend([-1] * (number - len(self._place)))
        self._place.append(len(self._lines))
        self._prompts.append(key_of(squeezed(row.system), loosened(row.prompt)))
        self._answers.append(key_of(label_key(row.answer)))
        self._lines.append(row.source.line)
        self._numbers.append(number)
        self._are_labels.append(is_like_label(row.answer.strip()))

    def finish(self, index: NearIndex, near: Groups) -> Iterator[Finding]:
        """`near` groups the rows that are duplicates of each other: these do not contradict."""
        if not self._lines:
            return
        groups = Groups(len(self._lines))
        prompts = np.frombuffer(self._prompts, dtype=np.uint64)
        order = np.argsort(prompts, kind="stable")
        for later in np.nonzero(prompts[order][1:] == prompts[order][:-1])[0]:
            groups.join(int(order[later]), int(order[later + 1]))
        for one, other in index.prompt_pairs():
            place = self._place[one] if one < len(self._place) else -1
            other_place = self._place[other] if other < len(self._place) else -1
            is_open = min(place, other_place) >= 0 and groups.first(place) != groups.first(other_place)
            if is_open and is_respelt(index.text(one)[0], index.text(other)[0]):
                groups.join(place, other_place)
        for members in groups.all():
            yield from self._of_group(members, index, near)

    def _of_group(self, members: list[int], index: NearIndex, near: Groups) -> Iterator[Finding]:
        first = members[0]
        are_labels = all(self._are_labels[member] for member in members)
        for member in members[1:]:
            is_near = near.first(self._numbers[member]) == near.first(self._numbers[first])
            if is_near or self._answers[member] == self._answers[first]:
                continue
            source = Source(file=self._file, line=self._lines[member])
            prompt, answer = index.text(self._numbers[member])
            if are_labels:
                other = index.text(self._numbers[first])[1]
                place = f"on line {self._lines[first]} it is {other[:40]!r}"
                message = f"the answer is {answer[:40]!r}; for this prompt {place}"
                yield CONFLICT.finding(source, message, seen=prompt)
            else:
                message = f"line {self._lines[first]} has this prompt with another answer"
                yield SEVERAL_ANSWERS.finding(source, message, seen=prompt)


def is_respelt(one: str, other: str) -> bool:
    """Whether two prompts differ in nothing but small words and single letters of long words.

    >>> is_respelt("where is my parcel please", "where is my parcle")
    True
    >>> is_respelt("what is the capital of france", "what is the capital of spain")
    False
    """
    ones, others = set(words(one)).difference(_SMALL_WORDS), set(words(other)).difference(_SMALL_WORDS)
    if max(len(ones - others), len(others - ones)) > 2:
        return False
    changed = [(word, others) for word in ones - others] + [(word, ones) for word in others - ones]
    return all(any(_is_typo(word, candidate) for candidate in candidates) for word, candidates in changed)


def _is_typo(one: str, other: str) -> bool:
    """One letter changed, missing, added, or two neighbours swapped, in a word of four and more."""
    if (
        min(len(one), len(other)) < _MIN_TYPO_LENGTH
        or abs(len(one) - len(other)) > 1
        or any(map(str.isdigit, one + other))
    ):
        return False
    start = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    if len(one) == len(other):
        is_swap = (
            one[start + 1 : start + 2] == other[start : start + 1]
            and one[start] == other[start + 1 : start + 2]
        )
        return one[start + 1 :] == other[start + 1 :] or (is_swap and one[start + 2 :] == other[start + 2 :])
    short, long = sorted((one, other), key=len)
    return short[start:] == long[start + 1 :]
