"""Real fine-tune files, good and bad, each get the right verdict. Skipped where they are not."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from phinetune.data.checking import CheckOptions, check_file
from phinetune.data.formats.row_forms import ReadOptions, column_options

FOLDER = Path(os.environ.get("PHINETUNE_DATA", "none")) / "chat-wild" / "open"
needs_files = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="needs PHINETUNE_DATA with the folder chat-wild/open"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a file must be said to be: its form, sound rows, and rules that must or must not speak."""

    form: str
    num_sound: int
    errors: dict[str, int] = field(default_factory=dict)
    warnings: frozenset[str] = frozenset()
    fix: str = ""


def rules(*names: str) -> frozenset[str]:
    return frozenset(names)


FEW = rules("too_few_rows")
VERDICTS = {
    "azure.validation_set.jsonl": Verdict(form="JSON Lines of messages, Windows line ends", num_sound=10),
    "azure.gsm8k_chat_train.jsonl": Verdict(form="JSON Lines of messages", num_sound=449),
    "azure.dpo_200.jsonl": Verdict(
        form="JSON Lines of preference pairs (DPO)",
        num_sound=0,
        errors={"preference_pair": 200},
        fix="--keep preferred",
    ),
    "azure.prompt_completion.valid.jsonl": Verdict(form="JSON Lines of prompts and answers", num_sound=45),
    "prompt_completion_crlf.jsonl": Verdict(
        form="JSON Lines of prompts and answers, Windows line ends", num_sound=10
    ),
    "mlx.prompt_completion.jsonl": Verdict(
        form="JSON Lines of prompts and answers",
        num_sound=144,
        warnings=rules("exact_duplicate", "near_duplicate", "same_answer"),
    ),
    "vision_content_parts.jsonl": Verdict(
        form="JSON Lines of messages", num_sound=0, errors={"content_type": 10}, fix="images"
    ),
    "pretty_printed_not_jsonl.jsonl": Verdict(
        form="JSON Lines of rows with", num_sound=0, errors={"no_messages": 1}
    ),
    "pretty_printed_objects.jsonl": Verdict(
        form="JSON Lines of rows with image_url, tags",
        num_sound=0,
        errors={"json": 9, "no_messages": 1},
        fix="comma",
    ),
    "ederson_val_copy.jsonl": Verdict(form="JSON Lines of messages, Windows line ends", num_sound=25),
    "llamafactory.v1_dpo_demo.jsonl": Verdict(
        form="JSON Lines of preference pairs (DPO)",
        num_sound=0,
        errors={"preference_pair": 10},
        fix="--keep preferred",
    ),
    "llamafactory.reason_tool_use.head.jsonl": Verdict(
        form="JSON Lines of messages",
        num_sound=0,
        errors={"content_type": 46, "tools": 10, "role": 6},
        fix="--tools",
    ),
    "cookbook.drone_training.3rows.jsonl": Verdict(
        form="JSON Lines of messages", num_sound=0, errors={"tools": 6, "no_content": 3}, fix="--tools text"
    ),
    "waistudio.dataset-classification.json": Verdict(
        form="JSON Lines of rows with phrase, tone",
        num_sound=0,
        errors={"no_messages": 1464},
        fix="--map prompt=phrase --map answer=tone",
    ),
    "waistudio.queries.jsonl": Verdict(
        form="JSON Lines of rows with query", num_sound=0, errors={"no_messages": 5}, fix="no answer"
    ),
}
# How the files that another command can read are read then: rows, and what is still wrong.
WITH_OPTIONS = {
    "azure.dpo_200.jsonl": (ReadOptions(keep_preferred=True), 200, 0),
    "cookbook.drone_training.3rows.jsonl": (ReadOptions(tools_as_text=True), 3, 0),
    "waistudio.dataset-classification.json": (
        ReadOptions(columns=column_options(["prompt=phrase", "answer=tone"])), 1464, 0,
    ),
}  # fmt: skip


@needs_files
@pytest.mark.parametrize("name", VERDICTS)
def test_a_real_file_gets_its_verdict(name: str) -> None:
    verdict = VERDICTS[name]
    report = check_file(FOLDER / name)
    assert verdict.form in report.form
    assert report.num_examples == verdict.num_sound
    kinds = {finding.rule: finding for finding in report.findings}
    errors = {rule: count for rule, count in report.counts.items() if kinds[rule].is_error}
    assert errors == verdict.errors
    warnings = {rule for rule in report.counts if kinds[rule].severity == "warning"}
    assert warnings - {"unknown_key"} == verdict.warnings
    if verdict.fix:
        assert any(verdict.fix in finding.fix for finding in report.findings)


@needs_files
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_a_real_file_of_another_kind_can_be_read(name: str) -> None:
    options, num_sound, num_errors = WITH_OPTIONS[name]
    report = check_file(FOLDER / name, CheckOptions(read=options))
    assert (report.num_examples, report.num_errors) == (num_sound, num_errors)


@needs_files
def test_every_file_has_a_verdict() -> None:
    assert {path.name for path in FOLDER.iterdir()} == VERDICTS.keys()
