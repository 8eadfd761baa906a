"""What the rows as a whole are like: classes and their shares, variety of words, openings and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from phinetune.data.conversation import Source
from phinetune.data.findings import Finding
from phinetune.data.rules.base import RowView, Rule, squeezed

IMBALANCE = Rule(
    id="class_imbalance",
    severity="warning",
    meaning="the model answers with the commonest class and is right often enough to look good",
    fix="add rows of the rare classes, or draw fewer of the common one: phinetune data sample --balance",
)
RARE_CLASS = Rule(
    id="rare_class",
    severity="note",
    meaning="a class of very few rows is not learnt and cannot be judged",
    fix="add rows of this class, or merge it with another",
)
LABEL_SPELLING = Rule(
    id="label_spelling",
    severity="warning",
    meaning="one class under several spellings is several classes to a model",
    fix="write it in one way",
    can_clean="the commonest spelling is written everywhere",
)
SAME_ANSWER = Rule(
    id="same_answer",
    severity="warning",
    meaning="one long answer to many different prompts teaches the model to ignore the prompt",
    fix="keep a few of these rows, or write answers of their own",
)
TEMPLATE = Rule(
    id="template_share",
    severity="note",
    meaning="when most answers or prompts begin alike, the adapter learns the opening and little else",
    fix="vary the wording; keep it if the form is the task",
)
LOW_VARIETY = Rule(
    id="low_variety",
    severity="note",
    meaning="few different words or phrases: generated rows that repeat each other",
    fix="add rows of other kinds; more of the same do not help",
)

MAX_CLASSES = 200
_MAX_SHARE_OF_OTHERS = 0.05
MAX_LABEL_CHARS = 40
_MAX_WORDS_OF_LABEL = 4
_MAX_CLASS_CHARS, _MAX_WORDS_OF_CLASS = 60, 8
_MAX_COUNTED = 20_000
_NUM_SAMPLED = 4000
_MIN_ROWS = 50


@dataclass(slots=True, kw_only=True)
class Variety:
    """Shares of different words and pairs of words among those of a sample of answers."""

    num_words: int = 0
    num_pairs: int = 0
    words: set[str] = field(default_factory=set)
    pairs: set[tuple[str, str]] = field(default_factory=set)

    def add(self, its_words: list[str]) -> None:
        self.num_words += len(its_words)
        self.words.update(its_words)
        pairs = list(pairwise(its_words))
        self.num_pairs += len(pairs)
        self.pairs.update(pairs)

    @property
    def distinct_1(self) -> float:
        return len(self.words) / max(self.num_words, 1)

    @property
    def distinct_2(self) -> float:
        return len(self.pairs) / max(self.num_pairs, 1)


class ClassCheck:
    """Finds out whether answers are labels; if so, counts the classes."""

    def __init__(self, file: str) -> None:
        self._whole = Source(file=file, line=0)
        self._labels: Counter[str] | None = Counter()
        self._num_rows = self._num_others = 0

    def see(self, row: RowView) -> Iterator[Finding]:
        if self._labels is not None:
            label = row.answer.strip()
            self._num_rows += 1
            if _may_name_a_class(label) and row.is_single_turn:
                self._labels[label] += 1
            else:
                self._num_others += 1
            # A wrong answer among labels leaves them what they are; many answers of all kinds are none.
            are_many_others = self._num_others > max(20, _MAX_SHARE_OF_OTHERS * self._num_rows)
            if are_many_others or len(self._labels) > 4 * MAX_CLASSES:
                self._labels = None
        return iter(())

    @property
    def classes(self) -> Counter[str]:
        """Rows by class with its spellings joined; empty where answers are no labels."""
        is_enough = self._num_rows >= 10 and self._num_others <= _MAX_SHARE_OF_OTHERS * self._num_rows
        if not self._labels or not is_enough:
            return Counter()
        joined: Counter[str] = Counter()
        for spellings in self._spellings().values():
            joined[spellings.most_common(1)[0][0]] = spellings.total()
        has_enough = len(joined) * 5 <= self._num_rows and 2 <= len(joined) <= MAX_CLASSES
        return joined if has_enough else Counter()

    def _spellings(self) -> dict[str, Counter[str]]:
        grouped: dict[str, Counter[str]] = {}
        for label, count in (self._labels or {}).items():
            grouped.setdefault(label_key(label), Counter())[label] = count
        return grouped

    def finish(self) -> Iterator[Finding]:
        classes = self.classes
        if not classes:
            return
        for spellings in self._spellings().values():
            if len(spellings) > 1:
                shown = ", ".join(f"{name!r} {count:,}" for name, count in spellings.most_common(4))
                yield LABEL_SPELLING.finding(self._whole, f"one class is written in several ways: {shown}")
        (most, most_rows), (least, least_rows) = classes.most_common(1)[0], classes.most_common()[-1]
        if most_rows > 10 * least_rows or most_rows * 10 > 8 * classes.total():
            message = f"{most!r} has {most_rows:,} of {classes.total():,} rows, {least!r} has {least_rows:,}"
            yield IMBALANCE.finding(self._whole, message)
        for label, count in classes.items():
            if count < 5 and classes.total() >= _MIN_ROWS:
                yield RARE_CLASS.finding(self._whole, f"the class {label!r} has {count} rows")


class VarietyCheck:
    """Openings, repeated answers, and distinct words, in tables that stay small."""

    def __init__(self, file: str, classes: ClassCheck) -> None:
        self._whole, self._classes = Source(file=file, line=0), classes
        self._answers: Counter[int] = Counter()
        self._seen: dict[int, tuple[int, str]] = {}
        self._openings: dict[str, Counter[str]] = {"answers": Counter(), "prompts": Counter()}
        self._num_rows = 0
        self.variety = Variety()

    def see(self, row: RowView) -> Iterator[Finding]:
        self._num_rows += 1
        if len(row.answer) > MAX_LABEL_CHARS:
            key = hash(squeezed(row.answer))
            _count(self._answers, key)
            if self._answers[key] == 2:
                self._seen[key] = (row.source.line, row.answer[:60])
        for name, its_words in (("answers", row.answer_words), ("prompts", row.prompt_words)):
            if len(its_words) > 3:
                _count(self._openings[name], " ".join(its_words[:3]))
        if self._num_rows <= _NUM_SAMPLED:
            self.variety.add(row.answer_words)
        return iter(())

    def finish(self) -> Iterator[Finding]:
        if self._num_rows < _MIN_ROWS:
            return
        for key, count in self._answers.most_common(3):
            if count * 20 > self._num_rows and key in self._seen:
                line, seen = self._seen[key]
                source = Source(file=self._whole.file, line=line)
                message = f"{count:,} of {self._num_rows:,} rows have this one answer"
                yield SAME_ANSWER.finding(source, message, seen=seen)
        for name, (opening, share) in self.commonest_openings().items():
            if share > 0.5:
                yield TEMPLATE.finding(self._whole, f"{share:.0%} of the {name} begin with {opening!r}")
        # Labels repeat by nature.
        if not self._classes.classes and self.variety.num_pairs > 500 and self.variety.distinct_2 < 0.1:
            message = f"only {self.variety.distinct_2:.1%} of the pairs of words in answers differ"
            yield LOW_VARIETY.finding(self._whole, message)

    def commonest_openings(self) -> dict[str, tuple[str, float]]:
        """The commonest first three words of answers and of prompts, and their share of the rows."""
        found = {name: openings.most_common(1)[0] for name, openings in self._openings.items() if openings}
        return {name: (opening, count / self._num_rows) for name, (opening, count) in found.items()}


def is_like_label(text: str) -> bool:
    """Whether an answer is short enough to be the name of a class."""
    return 0 < len(text) <= MAX_LABEL_CHARS and len(text.split()) <= _MAX_WORDS_OF_LABEL


def _may_name_a_class(text: str) -> bool:
    """Longer than a label alone may be: that it stands in many rows is asked for later."""
    return 0 < len(text) <= _MAX_CLASS_CHARS and len(text.split()) <= _MAX_WORDS_OF_CLASS


def label_key(label: str) -> str:
    """What spellings of one class have in common.

    >>> label_key("Joy.") == label_key(" joy")
    True
    """
    return squeezed(label).rstrip(".!").replace("_", " ").replace("-", " ")


def _count(table: Counter[int] | Counter[str], key: int | str) -> None:
    """Count, and forget the rarest when the table is full: what is common stays."""
    table[key] += 1  # type: ignore[index]
    if len(table) > 2 * _MAX_COUNTED:
        for rare, _ in table.most_common()[: _MAX_COUNTED - 1 : -1]:
            del table[rare]
