"""Apply chosen rules to a file: rows are repaired or left out until nothing more is found.

Because of that a second cleaning changes nothing. Rows wait in temporary files, never in memory.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np

from phinetune.base.errors import SettingsError, nearest
from phinetune.data.changing.writing import example_of, line_of, row_of
from phinetune.data.conversation import Conversation, Example, Source
from phinetune.data.findings import Finding, excerpt
from phinetune.data.formats.row_forms import ReadOptions
from phinetune.data.groups import Groups
from phinetune.data.near import NearIndex
from phinetune.data.private.finding import Redactor, private_spans
from phinetune.data.reading import read_examples, require_file, sound_rows
from phinetune.data.rules.answers import AnswersCheck
from phinetune.data.rules.balance import ClassCheck, label_key
from phinetune.data.rules.base import RowView
from phinetune.data.rules.catalog import RULES
from phinetune.data.rules.duplicates import DuplicateCheck, row_key, take_in
from phinetune.data.rules.encoding import repaired
from phinetune.data.rules.judged import Judge
from phinetune.data.rules.leaks import LeakCheck
from phinetune.data.rules.lengths import TokenCounter
from phinetune.data.rules.markup import is_markup_meant, without_markup

DEFAULT_RULES = (
    "mojibake", "html", "private_data", "secret", "empty_system", "label_spelling", "boilerplate",
    "exact_duplicate", "near_duplicate", "leak_row", "leak_prompt",
)  # fmt: skip
ON_REQUEST = ("refusal", "conflicting_answers", "over_long", "toxic")
# A round that changes nothing ends it; only chains of repairs that make duplicates need several.
_MAX_ROUNDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanOptions:
    """Which rules are applied, and what they need. Rows that cannot be read are always left out."""

    rules: tuple[str, ...] = DEFAULT_RULES
    read: ReadOptions = field(default_factory=ReadOptions)
    test_file: Path | None = None
    count_tokens: TokenCounter | None = None
    judge: Judge | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that was done to the row that began on `line`. `before` and `after` show no private data."""

    line: int
    rule: str
    is_dropped: bool
    why: str = ""
    before: str = ""
    after: str = ""


@dataclass(slots=True)
class Cleaned:
    """The rows that are left, in a temporary file, and every change in the order of lines."""

    rows: IO[str]
    changes: list[Change]
    num_read: int = 0
    num_kept: int = 0
    redacted: dict[str, int] = field(default_factory=dict)
    unused_keys: tuple[str, ...] = ()

    def examples(self) -> Iterator[Example]:
        """The rows that are left; their lines are their numbers in the old file."""
        return _spooled(self.rows)

    def counts(self, *, is_dropped: bool) -> Counter[str]:
        """Rows dropped, or changes made, by rule."""
        return Counter(change.rule for change in self.changes if change.is_dropped == is_dropped)


def chosen_rules(only: Iterable[str], more: Iterable[str], without: Iterable[str]) -> tuple[str, ...]:
    """The rules of a cleaning; raises `SettingsError` for one that cannot be applied."""
    known = (*DEFAULT_RULES, *ON_REQUEST)
    for rule in (*only, *more, *without):
        if rule not in known:
            near = nearest(rule, known)
            why = "this rule only finds" if rule in RULES else ""
            do = f"did you mean {near}?" if near else f"choose among {', '.join(known)}"
            raise SettingsError(f"data clean cannot apply '{rule}'", where="--rule", why=why, do=do)
    chosen = [*(only or DEFAULT_RULES), *more]
    return tuple(rule for rule in known if rule in chosen and rule not in set(without))


def clean_rows(path: Path, options: CleanOptions) -> Cleaned:
    """Clean a file round by round. The result's temporary file is closed by whoever uses it."""
    cleaner = _Cleaner(path, options)
    try:
        rows = cleaner.read_all()
        for _ in range(_MAX_ROUNDS):
            num_changes = len(cleaner.changes)
            rows = cleaner.round(rows)
            if len(cleaner.changes) == num_changes:
                break
    except BaseException:
        cleaner.close()
        raise
    cleaner.changes.sort(key=lambda change: change.line)
    num_kept = sum(1 for _ in _spooled(rows))
    return Cleaned(
        rows, cleaner.changes, cleaner.num_read, num_kept, cleaner.redactor.counts, tuple(cleaner.unused_keys)
    )


class _Cleaner:
    """One file and what was done to it so far."""

    def __init__(self, path: Path, options: CleanOptions) -> None:
        self._path, self._options = path, options
        self._rules = set(options.rules)
        self.changes: list[Change] = []
        self.redactor = Redactor()
        self.num_read = 0
        self._spools: list[IO[str]] = []
        self._lines = array("q", [0])  # of every row by its number, which tells rows of one line apart
        self.unused_keys: dict[str, None] = {}
        self._answers = AnswersCheck()

    def close(self) -> None:
        """Let every temporary file go."""
        for rows in self._spools:
            rows.close()

    def _spool(self) -> IO[str]:
        """A new temporary file of rows."""
        self._spools.append(tempfile.TemporaryFile("w+", encoding="utf-8", prefix="phinetune-"))  # noqa: SIM115 (see `close`)
        return self._spools[-1]

    def read_all(self) -> IO[str]:
        """Every row that can be read, as it is."""
        require_file(self._path)
        spool = self._spool()
        for item in read_examples(self._path, self._options.read):
            if not isinstance(item, Finding):
                self.num_read += 1
                spool.write(line_of([len(self._lines), row_of(item)]))
                self._lines.append(item.source.line)
            elif item.is_error:
                self.num_read += 1
                self._note(item.line, item.rule, is_dropped=True, why=item.message)
            elif item.rule == "unknown_key":
                self.unused_keys[item.field] = None
        return spool

    def round(self, rows: IO[str]) -> IO[str]:
        """Repair each row, then leave out what is not wanted; the old temporary file is closed."""
        spellings = self._spellings(rows)
        repaired_rows = self._spool()
        for example in _spooled(rows):
            _put(repaired_rows, self._repaired(example, spellings))
        rows.close()
        unwanted = self._unwanted(repaired_rows)
        if not unwanted:
            return repaired_rows
        kept = self._spool()
        for example in _spooled(repaired_rows):
            if example.source.line not in unwanted:
                _put(kept, example)
        repaired_rows.close()
        return kept

    def _note(
        self,
        line: int,
        rule: str,
        *,
        is_dropped: bool = False,
        why: str = "",
        before: str = "",
        after: str = "",
    ) -> None:
        change = Change(line=line, rule=rule, is_dropped=is_dropped, why=why, before=before, after=after)
        self.changes.append(change)

    def _spellings(self, rows: IO[str]) -> dict[str, str]:
        """The commonest spelling of each class that has several."""
        if "label_spelling" not in self._rules:
            return {}
        check = ClassCheck("")
        for number, example in enumerate(_spooled(rows)):
            list(check.see(RowView(example, number)))
        return {label_key(label): label for label in check.classes}

    def _repaired(self, example: Example, spellings: dict[str, str]) -> Example:
        line = self._lines[example.source.line]
        if example.label is not None and label_key(example.label) in spellings:
            label = self._relabelled(line, example.label, spellings[label_key(example.label)])
            example = replace(example, label=label)
        if not isinstance(example, Conversation):
            text = self._repaired_text(line, example.text, is_markup=False)
            return replace(example, text=text) if text != example.text else example
        row = RowView(example, 0)
        is_markup = is_markup_meant(row)
        messages = []
        for message in example.messages:
            if "empty_system" in self._rules and message.role == "system" and not message.content.strip():
                self._note(line, "empty_system", why="left out")
                continue
            text = self._repaired_text(line, message.content, is_markup=is_markup)
            if example.label is None and message.role == "assistant" and label_key(text) in spellings:
                text = self._relabelled(line, text, spellings[label_key(text)])
            messages.append(replace(message, content=text) if text != message.content else message)
        return replace(example, messages=tuple(messages))

    def _relabelled(self, line: int, text: str, label: str) -> str:
        if text.strip() == label:
            return text
        self._note(line, "label_spelling", before=text, after=label)
        return label

    def _repaired_text(self, line: int, text: str, *, is_markup: bool) -> str:
        if "mojibake" in self._rules:
            text = self._changed(line, "mojibake", text, repaired(text))
        if "html" in self._rules and not is_markup and (plain := without_markup(text)) != text:
            # A turn of nothing but markup would become an empty one, which is no row at all.
            text = self._changed(line, "html", text, plain) if plain.strip() else text
        for rule, is_secret in (("private_data", False), ("secret", True)):
            spans = [span for span in private_spans(text) if span.is_secret == is_secret]
            if rule in self._rules and spans:
                kinds = ", ".join(sorted({span.kind for span in spans}))
                self._note(line, rule, why=f"replaced: {kinds}")
                text = self.redactor.redacted(text, is_secret=is_secret)
        return text

    def _changed(self, line: int, rule: str, before: str, after: str) -> str:
        if before != after:
            place = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
            hidden = Redactor()
            seen = [excerpt(hidden.redacted(text), around=place) for text in (before, after)]
            self._note(line, rule, before=seen[0], after=seen[1])
        return after

    def _unwanted(self, rows: IO[str]) -> set[int]:
        """The numbers of rows that are left out, each said once with its reason."""
        dropped: set[int] = set()

        def drop(number: int, rule: str, why: str) -> None:
            if rule in self._rules and number not in dropped:
                dropped.add(number)
                self._note(self._lines[number], rule, is_dropped=True, why=why)

        for number, rule, why in self._unwanted_alone(rows):
            drop(number, rule, why)
        for number, rule, why in self._duplicates(rows, dropped):
            drop(number, rule, why)
        return dropped

    def _unwanted_alone(self, rows: IO[str]) -> Iterator[tuple[int, str, str]]:
        """Rows that are unwanted for themselves or for a test set: (number, rule, why)."""
        classes = ClassCheck("")
        for check in self._leak_checks(classes):
            for example in _spooled(rows):
                row = RowView(example, example.source.line)
                list(classes.see(row))
                yield from _leaks(check.see(row))
            yield from _leaks(check.finish())
        counter, judge = self._options.count_tokens, self._options.judge
        is_asked = bool({"boilerplate", "refusal"} & self._rules)
        for example in _spooled(rows):
            number = example.source.line
            row = RowView(example, number)
            if is_asked:
                yield from ((number, finding.rule, finding.message) for finding in self._answers.see(row))
            if "over_long" in self._rules and counter is not None and (count := counter(example)).num_lost:
                yield number, "over_long", f"{count.num_tokens:,} tokens"
            if (
                "toxic" in self._rules
                and judge is not None
                and (harm := judge(f"{row.prompt}\n{row.answer}"))
            ):
                yield number, "toxic", harm

    def _leak_checks(self, classes: ClassCheck) -> list[DuplicateCheck | LeakCheck]:
        """The checks of two rows against each other; `classes` sees the rows while the first of them does."""
        name = str(self._path)
        if self._options.test_file is None:
            asked = "conflicting_answers" in self._rules
            return [DuplicateCheck(name, classes=classes)] if asked else []
        return [DuplicateCheck(name, self._test_rows(), classes), LeakCheck(self._test_rows())]

    def _test_rows(self) -> Iterator[RowView]:
        assert self._options.test_file is not None
        rows = sound_rows(self._options.test_file, self._options.read)
        yield from (RowView(example, 0) for example in rows)

    def _duplicates(self, rows: IO[str], dropped: set[int]) -> Iterator[tuple[int, str, str]]:
        """Rows that stand elsewhere too: (number, rule, why). The best of each group stays."""
        with NearIndex() as index:
            yield from self._alike(rows, dropped, index)

    def _alike(self, rows: IO[str], dropped: set[int], index: NearIndex) -> Iterator[tuple[int, str, str]]:
        first_number: dict[int, int] = {}
        numbers, sizes = array("q"), array("q")
        for example in _spooled(rows):
            number = example.source.line
            if number in dropped:
                continue
            row = RowView(example, number)
            first = first_number.setdefault(row_key(row), number)
            if first != number and "exact_duplicate" in self._rules:
                yield number, "exact_duplicate", f"the same row as line {self._lines[first]}"
            elif "near_duplicate" in self._rules:
                take_in(index, row)
                numbers.append(number)
                sizes.append(len(row.answer))
        is_alive_R = np.ones(len(numbers), dtype=bool)
        while pairs := list(index.pairs(is_alive_R)):
            groups = Groups(len(numbers))
            for one, other in pairs:
                groups.join(one, other)
            for members in groups.all():
                best = max(members, key=lambda member: (sizes[member], -member))
                kept = f"nearly line {self._lines[numbers[best]]}, which is kept"
                for member in members:
                    if member != best:
                        is_alive_R[member] = False
                        yield numbers[member], "near_duplicate", kept


def _leaks(findings: Iterable[Finding]) -> Iterator[tuple[int, str, str]]:
    """What two files or two rows have against each other; that rows stand twice is judged elsewhere."""
    for finding in findings:
        if finding.rule == "conflicting_answers":
            yield finding.line, finding.rule, "an earlier row has this prompt with another label"
        elif finding.rule in ("leak_row", "leak_prompt"):
            yield finding.line, finding.rule, finding.message


def _put(rows: IO[str], example: Example) -> None:
    rows.write(line_of([example.source.line, row_of(example)]))


def _spooled(rows: IO[str]) -> Iterator[Example]:
    """The rows of a temporary file; the line of each is its number."""
    rows.seek(0)
    for text in rows:
        number, row = json.loads(text)
        yield example_of(row, Source(file="", line=number))
    rows.seek(0, 2)
