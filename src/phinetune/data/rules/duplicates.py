"""Rows that stand twice, nearly twice, or contradict each other; and rows that leak from a test set.

Rows whose numbers differ are never near-duplicates, nor are those with different short answers: `12 + 5` and
`12 + 6` look alike and are two examples.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phinetune.data.conversation import Source
from phinetune.data.findings import Finding
from phinetune.data.groups import Groups
from phinetune.data.near import NearIndex
from phinetune.data.rules.balance import ClassCheck, is_like_label, label_key
from phinetune.data.rules.base import RowView, Rule, squeezed, words
from phinetune.data.spool import RecordSpool, equal_runs

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
_PAIRS_AT_ONCE = 50_000


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
    label = () if row.example.label is None else (f"label\1{squeezed(row.example.label)}",)
    return key_of(*(f"{role}\1{squeezed(text)}" for _, role, text in row.parts), *label)


def near_guard(row: RowView) -> int:
    """What near-duplicates must share: system message, numbers, and the answer where it is short."""
    answer = label_key(row.answer) if is_like_label(row.answer.strip()) else ""
    numbers = " ".join([*_NUMBER.findall(row.prompt), "|", *_NUMBER.findall(row.answer)])
    return zlib.crc32(f"{squeezed(row.system)}\0{numbers}\0{answer}".encode("utf-8", "surrogatepass"))


def prompt_guard(row: RowView) -> int:
    """What near-equal prompts must share."""
    numbers = " ".join(_NUMBER.findall(row.prompt))
    return zlib.crc32(f"{squeezed(row.system)}\0{numbers}".encode("utf-8", "surrogatepass"))


def take_in(index: NearIndex, row: RowView) -> None:
    """Put a row among those to be paired with their near-duplicates.

    Of labelled rows the prompts alone are compared: "ok" and "sure" are not alike for having the same label.
    """
    index.add(
        squeezed(row.prompt),
        squeezed(row.answer),
        guard=near_guard(row),
        prompt_guard=prompt_guard(row),
        is_prompt_alone=is_like_label(row.answer.strip()) and bool(row.prompt.strip()),
    )


_RECORD = [
    ("key", "u8"),  # of the whole row
    ("prompt", "u8"),  # of the prompt, 0 where there is none or several
    ("answer", "u8"),
    ("line", "i8"),  # negative in the test set
    ("is_label", "?"),
]


class DuplicateCheck:
    """Keeps rows in temporary files, some 20 bytes of each in memory; speaks at the end.

    `test_rows` are rows of a test set: what is like one of them is a leak. `classes`, which saw the same
    rows, knows the labels that are longer than labels mostly are.
    """

    def __init__(
        self, file: str, test_rows: Iterable[RowView] = (), classes: ClassCheck | None = None
    ) -> None:
        self._file, self._classes = file, classes
        self._index = NearIndex()
        self._records = RecordSpool(_RECORD)
        self._test_file = ""
        self._num_tests = 0
        self.num_exact = self.num_near = 0
        try:
            for row in test_rows:
                self._test_file = row.source.file
                self._take(row, -row.source.line)
                self._num_tests += 1
        except BaseException:
            self.close()
            raise

    def see(self, row: RowView) -> Iterator[Finding]:
        self._take(row, row.source.line)
        return iter(())

    def _take(self, row: RowView, line: int) -> None:
        has_prompt = row.is_single_turn and bool(row.prompt.strip())
        key = key_of(squeezed(row.system), loosened(row.prompt)) | 1 if has_prompt else 0
        is_label = is_like_label(row.answer.strip())
        self._records.add(row_key(row), key, key_of(label_key(row.answer)), line, is_label)
        take_in(self._index, row)

    def finish(self) -> Iterator[Finding]:
        is_new_R = np.ones(len(self._records), dtype=bool)
        yield from self._exact(is_new_R)
        groups = Groups(len(self._records))
        for one, other in self._index.pairs(is_new_R):
            groups.join(one, other)
        yield from self._near(groups)
        labels = self._classes.classes if self._classes else ()
        label_keys = frozenset(key_of(label_key(label)) for label in labels)
        conflicts = _Conflicts(self._file, self._records, self._index, label_keys, self._num_tests)
        yield from conflicts.findings(is_new_R, groups)
        self.close()

    def _exact(self, is_new_R: NDArray[np.bool_]) -> Iterator[Finding]:
        """Rows that stood before; they are marked as not new."""
        found = [runs[[0, 2]] for runs in equal_runs(self._records.field("key"))]
        if not found:
            return
        firsts, later = np.concatenate(found, axis=1)
        is_new_R[later] = False
        order = np.argsort(later)
        for first, number, first_line, line in self._lined(firsts[order], later[order]):
            if number < self._num_tests:
                continue
            source = Source(file=self._file, line=line)
            prompt, answer = self._index.text(number)
            if first < self._num_tests:
                place = f"{self._test_file}:{-first_line}"
                yield LEAK.finding(source, f"the row is row {place} of the test set", seen=answer)
            else:
                self.num_exact += 1
                yield DUPLICATE.finding(source, f"the same row as line {first_line}", seen=prompt or answer)

    def _near(self, groups: Groups) -> Iterator[Finding]:
        # Rows of a test set come first: a group that holds one begins with it.
        for first, number, first_line, line in self._lined(*groups.others()):
            if number < self._num_tests:
                continue
            source = Source(file=self._file, line=line)
            seen = "".join(self._index.text(number))
            if first < self._num_tests:
                place = f"{self._test_file}:{-first_line}"
                yield LEAK.finding(source, f"nearly the row {place} of the test set", seen=seen)
            else:
                self.num_near += 1
                message = f"nearly the same row as line {first_line}"
                yield NEAR_DUPLICATE.finding(source, message, seen=seen)

    def _lined(self, firsts: NDArray[Any], numbers: NDArray[Any]) -> Iterator[tuple[int, int, int, int]]:
        """(first, number, line of the first, line) of every pair, looked up many at a time."""
        for start in range(0, len(numbers), _PAIRS_AT_ONCE):
            ones, others = firsts[start : start + _PAIRS_AT_ONCE], numbers[start : start + _PAIRS_AT_ONCE]
            lines = self._records.at(np.concatenate([ones, others]))["line"]
            columns = (ones, others, lines[: len(ones)], lines[len(ones) :])
            yield from zip(*(column.tolist() for column in columns), strict=True)

    def close(self) -> None:
        """Let the temporary files go."""
        self._index.close()
        self._records.close()


class _Conflicts:
    """Prompts of one turn with different answers: equal but for case and marks, or but for a misspelling."""

    def __init__(
        self,
        file: str,
        records: RecordSpool,
        index: NearIndex,
        label_keys: frozenset[int],
        num_tests: int,
    ) -> None:
        self._file, self._records, self._index = file, records, index
        self._label_keys, self._num_tests = label_keys, num_tests

    def findings(self, is_new_R: NDArray[np.bool_], near: Groups) -> Iterator[Finding]:
        """`near` groups the rows that are duplicates of each other: these do not contradict."""
        prompts_R = self._records.field("prompt")
        is_asked_R = is_new_R & (prompts_R != 0)
        is_asked_R[: self._num_tests] = False
        groups = Groups(len(self._records))
        for _, before, later in equal_runs(prompts_R, is_asked_R):
            for one, other in zip(before.tolist(), later.tolist(), strict=True):
                groups.join(one, other)
        del prompts_R
        for one, other in self._index.prompt_pairs():
            is_open = is_asked_R[one] and is_asked_R[other] and groups.first(one) != groups.first(other)
            if is_open and is_respelt(self._index.text(one)[0], self._index.text(other)[0]):
                groups.join(one, other)
        for members in groups.all():
            yield from self._of_group(members, near)

    def _of_group(self, members: list[int], near: Groups) -> Iterator[Finding]:
        first, *others = members
        found = self._records.at(np.array(members))
        first_record, *records = found
        are_labels = all(record["is_label"] or int(record["answer"]) in self._label_keys for record in found)
        for member, record in zip(others, records, strict=True):
            is_near = near.first(member) == near.first(first)
            if is_near or record["answer"] == first_record["answer"]:
                continue
            source = Source(file=self._file, line=int(record["line"]))
            prompt, answer = self._index.text(member)
            if are_labels:
                place = f"on line {first_record['line']} it is {self._index.text(first)[1][:40]!r}"
                message = f"the answer is {answer[:40]!r}; for this prompt {place}"
                yield CONFLICT.finding(source, message, seen=prompt)
            else:
                message = f"line {first_record['line']} has this prompt with another answer"
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
