"""Check a whole data file in one pass: what it holds and everything that is wrong with it.

Knows nothing of terminals. What needs a tokenizer, a filter or a model is handed in.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from phinetune.data.conversation import Conversation, Example
from phinetune.data.findings import Finding as Finding
from phinetune.data.formats.recognise import recognise
from phinetune.data.formats.row_forms import ReadOptions
from phinetune.data.private.kinds import NOT_COVERED
from phinetune.data.reading import MAX_FINDINGS_KEPT, read_examples, sound_rows
from phinetune.data.rules.answers import AnswersCheck
from phinetune.data.rules.balance import ClassCheck, VarietyCheck
from phinetune.data.rules.base import Check, RowView
from phinetune.data.rules.clusters import ClusterCheck, Clusters
from phinetune.data.rules.duplicates import DuplicateCheck
from phinetune.data.rules.encoding import EncodingCheck
from phinetune.data.rules.judged import DoubtCheck, Judge, LossOf, ToxicCheck
from phinetune.data.rules.language import LanguageCheck
from phinetune.data.rules.leaks import LeakCheck
from phinetune.data.rules.lengths import LengthCheck, TokenCheck, TokenCounter
from phinetune.data.rules.markup import MarkupCheck
from phinetune.data.rules.private import PrivateCheck
from phinetune.data.rules.stereotypes import StereotypeCheck

MAX_KEPT_PER_RULE = 1000
_ROWS_BETWEEN_WORDS = 2000
_NOT_FOR_TRAINING = ("test", "valid", "eval", "dev")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """What a check may use. `max_judged` bounds the rows that the filter judges; None is all.

    `on_rows` is told now and then how many rows were looked at.

    Looking for duplicates needs temporary files: the text once more, and some 260 bytes a row.
    """

    read: ReadOptions = field(default_factory=ReadOptions)
    test_file: Path | None = None
    with_duplicates: bool = True
    count_tokens: TokenCounter | None = None
    judge: Judge | None = None
    max_judged: int | None = None
    loss_of: LossOf | None = None
    on_rows: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """Tokens of a file by a model's own tokenizer; `lengths` of every example in file order."""

    num_tokens: int
    num_trained: int
    num_lost: int
    lengths: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What a file holds. `num_examples` counts sound rows; `findings` come in the order they were found.

    At most 10,000 findings are kept, 1,000 of each rule; `counts` are of all. `lengths` are the characters of
    each example in file order, `num_turns` says how many conversations have that many turns, `openings` the
    commonest first words of answers and of prompts with their share.
    """

    file: str
    form: str
    size_bytes: int
    num_examples: int
    num_conversations: int
    num_texts: int
    num_trained_turns: int
    num_characters: int
    roles: Mapping[str, int]
    num_turns: Mapping[int, int]
    lengths: array[int]
    languages: Mapping[str, int]
    classes: Mapping[str, int]
    private_kinds: Mapping[str, int]
    private_not_covered: tuple[str, ...]
    num_exact_duplicates: int
    num_near_duplicates: int
    distinct_1: float
    distinct_2: float
    openings: Mapping[str, tuple[str, float]]
    clusters: Clusters
    num_judged: int
    tokens: TokenStatistics | None
    num_errors: int
    num_warnings: int
    num_notes: int
    counts: Mapping[str, int]
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        return self.num_errors == 0


def check_file(path: Path, options: CheckOptions | None = None) -> CheckReport:
    """Read all of `path` and report; never raises for what the file holds, nor when it is missing.

    Raises `DataError` where the test set to compare with cannot be read.
    """
    checking = _Checking(path, options or CheckOptions())
    try:
        return checking.report()
    finally:
        checking.close()


def is_training_set(path: Path) -> bool:
    """Whether a file's name leaves it open that it is trained on."""
    return not any(word in path.name.lower() for word in _NOT_FOR_TRAINING)


class _Checking:
    """One pass over one file."""

    def __init__(self, path: Path, options: CheckOptions) -> None:
        self._path, self._options = path, options
        name = str(path)
        self._counts: Counter[str] = Counter()
        self._severities: Counter[str] = Counter()
        self._kept: list[Finding] = []
        self._totals: Counter[str] = Counter()
        self._roles: Counter[str] = Counter()
        self._turns: Counter[int] = Counter()
        self._lengths = array("I")
        self._classes = ClassCheck(name)
        self._variety = VarietyCheck(name, self._classes)
        self._clusters = ClusterCheck(name)
        self._languages = LanguageCheck()
        self._private = PrivateCheck()
        self._duplicates = (
            DuplicateCheck(name, self._test_rows(), self._classes) if options.with_duplicates else None
        )
        self._checks: list[Check] = [
            EncodingCheck(), MarkupCheck(), AnswersCheck(), self._private, self._languages,
            LengthCheck(name, is_training_set=is_training_set(path)),
            self._classes, self._variety, self._clusters, StereotypeCheck(name),
        ]  # fmt: skip
        if options.test_file is not None:
            self._checks.append(LeakCheck(self._test_rows()))
        self._tokens = TokenCheck(options.count_tokens) if options.count_tokens else None
        self._toxic = ToxicCheck(options.judge, max_rows=options.max_judged) if options.judge else None
        doubt = DoubtCheck(name, options.loss_of) if options.loss_of else None
        wanted: tuple[Check | None, ...] = (self._duplicates, self._tokens, self._toxic, doubt)
        self._checks += [check for check in wanted if check is not None]

    def _test_rows(self) -> Iterator[RowView]:
        if self._options.test_file is not None:
            examples = sound_rows(self._options.test_file, self._options.read)
            yield from (RowView(example, number) for number, example in enumerate(examples))

    def report(self) -> CheckReport:
        form = recognise(self._path, self._options.read)
        number = 0
        for item in read_examples(self._path, self._options.read):
            if isinstance(item, Finding):
                self._keep([item])
                continue
            row = RowView(item, number)
            number += 1
            self._count(item)
            self._lengths.append(sum(len(text) for _, _, text in row.parts))
            for check in self._checks:
                self._keep(check.see(row))
            if self._options.on_rows is not None and number % _ROWS_BETWEEN_WORDS == 0:
                self._options.on_rows(number)
        for check in self._checks:
            self._keep(check.finish())
        return self._made(str(form) if form else "")

    def close(self) -> None:
        """Let temporary files go, also when something that was handed in failed."""
        if self._duplicates is not None:
            self._duplicates.close()

    def _keep(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._counts[finding.rule] += 1
            self._severities[finding.severity] += 1
            if self._counts[finding.rule] <= MAX_KEPT_PER_RULE and len(self._kept) < MAX_FINDINGS_KEPT:
                self._kept.append(finding)

    def _count(self, example: Example) -> None:
        if not isinstance(example, Conversation):
            self._totals["texts"] += 1
            self._totals["characters"] += len(example.text)
            return
        self._totals["conversations"] += 1
        self._turns[len(example.messages)] += 1
        for message in example.messages:
            self._roles[message.role] += 1
            self._totals["characters"] += len(message.content)
            self._totals["trained_turns"] += message.role == "assistant" and message.weight == 1

    def _made(self, form: str) -> CheckReport:
        totals, variety, tokens = self._totals, self._variety.variety, self._tokens
        return CheckReport(
            file=str(self._path),
            form=form,
            size_bytes=self._path.stat().st_size if self._path.is_file() else 0,
            num_examples=totals["conversations"] + totals["texts"],
            num_conversations=totals["conversations"],
            num_texts=totals["texts"],
            num_trained_turns=totals["trained_turns"],
            num_characters=totals["characters"],
            roles=dict(self._roles),
            num_turns=dict(sorted(self._turns.items())),
            lengths=self._lengths,
            languages=dict(self._languages.counts.most_common()),
            classes=dict(self._classes.classes.most_common()),
            private_kinds=dict(self._private.kinds.most_common()),
            private_not_covered=NOT_COVERED,
            num_exact_duplicates=self._duplicates.num_exact if self._duplicates else 0,
            num_near_duplicates=self._duplicates.num_near if self._duplicates else 0,
            distinct_1=variety.distinct_1,
            distinct_2=variety.distinct_2,
            openings=self._variety.commonest_openings(),
            clusters=self._clusters.clusters,
            num_judged=self._toxic.num_judged if self._toxic else 0,
            tokens=TokenStatistics(
                num_tokens=tokens.num_tokens,
                num_trained=tokens.num_trained,
                num_lost=tokens.num_lost,
                lengths=tokens.lengths,
            )
            if tokens
            else None,
            num_errors=self._severities["error"],
            num_warnings=self._severities["warning"],
            num_notes=self._severities["note"],
            counts=dict(self._counts.most_common()),
            findings=tuple(self._kept),
        )
