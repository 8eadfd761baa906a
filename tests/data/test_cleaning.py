"""Cleaning repairs and leaves out what it says, shows it, hides what is private, and is done after once."""

# ruff: noqa: E501 (lists of cases read best with few breaks)
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_faults import BOILERPLATE, IN_ROWS, PRIVATE, SECRETS, Sentences, broken, chat

from phinetune.base.errors import DataError, SettingsError, UserError
from phinetune.base.files import manifest_fault, sha256_file
from phinetune.data.changing.cleaning import DEFAULT_RULES, ON_REQUEST, CleanOptions, chosen_rules
from phinetune.data.changing.splitting import convert_file
from phinetune.data.changing.versions import CleanResult, clean_file
from phinetune.data.checking import check_file
from phinetune.data.findings import Finding
from phinetune.data.formats.row_forms import ReadOptions, column_options
from phinetune.data.reading import read_examples
from phinetune.data.rules.catalog import RULES


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8"
    )
    return path


def answers(path: Path) -> list[str]:
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return [row["messages"][-1]["content"] for row in rows if "messages" in row]


def clean(folder: Path, rows: list[Any], *more: str) -> tuple[CleanResult, list[str]]:
    options = CleanOptions(rules=chosen_rules((), more, ()))
    result = clean_file(write(folder / "train.jsonl", rows), folder / "clean", options)
    return result, answers(result.file) if result.file else []


def test_rows_are_repaired_and_left_out(tmp_path: Path) -> None:
    rows = [
        chat("One?", "CafÃ© &amp; tea<br>now"),
        chat("Two?", f"Write to {PRIVATE[0]}, or {PRIVATE[0].upper()}, or {PRIVATE[1]}."),
        chat("Three?", BOILERPLATE[0]),
        '{"messages": ',
        chat("Four?", "The very same answer."),
        chat("four?", "The very  same answer."),
    ]
    result, kept = clean(tmp_path, rows)
    assert kept == [
        "Café & tea\nnow",
        "Write to [EMAIL_1], or [EMAIL_1], or [PHONE_1].",
        "The very same answer.",
    ]
    assert result.dropped == {"json": 1, "boilerplate": 1, "exact_duplicate": 1}
    assert result.changed == {"mojibake": 1, "html": 1, "private_data": 1}
    assert result.redacted == {"EMAIL": 1, "PHONE": 1}
    assert (result.num_read, result.num_kept) == (6, 3)


def test_the_input_is_left_alone_and_the_version_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "train.v1.jsonl", [chat("a", "CafÃ©"), chat("b", "c")])
    before = sha256_file(path)
    result = clean_file(path, tmp_path / "clean", CleanOptions())
    assert sha256_file(path) == before
    assert result.folder is not None
    assert manifest_fault(result.folder) == ""
    assert sorted(file.name for file in result.folder.iterdir()) == [
        "MANIFEST.json", "changes.jsonl", "changes.md", "recipe.json", "train.jsonl",
    ]  # fmt: skip
    recipe = json.loads((result.folder / "recipe.json").read_text("utf-8"))
    assert recipe["input"] == {"name": "train.v1.jsonl", "size_bytes": path.stat().st_size, "sha256": before}
    (change,) = map(json.loads, (result.folder / "changes.jsonl").read_text("utf-8").splitlines())
    assert change == {"line": 1, "rule": "mojibake", "is_dropped": False, "before": "CafÃ©", "after": "Café"}
    assert "line 1: `CafÃ©` → `Café`" in (result.folder / "changes.md").read_text("utf-8")
    with pytest.raises(UserError, match="there already"):
        clean_file(path, tmp_path / "clean", CleanOptions())


def test_private_data_stands_nowhere_in_the_version(tmp_path: Path) -> None:
    values = [*PRIVATE, *(secret for secret in SECRETS if "=" not in secret)]
    rows = [
        chat(f"Mine is {value}?", f"CafÃ© <b>{value}</b> is yours, number {n}.")
        for n, value in enumerate(values)
    ]
    rows += [f'{{"messages": "{PRIVATE[0]}"}}', f"{PRIVATE[1]}"]
    result, kept = clean(tmp_path, rows)
    assert len(kept) == len(values)
    assert result.folder is not None
    for file in result.folder.iterdir():
        text = file.read_text("utf-8")
        assert not [value for value in values if value in text], file.name


def test_of_nearly_equal_rows_the_most_complete_is_kept(tmp_path: Path) -> None:
    answer = Sentences().answer()
    _, kept = clean(
        tmp_path, [chat("Q?", answer), chat("Q?", answer + " Really."), chat("Q?", answer + " So.")]
    )
    assert kept == [answer + " Really."]


def test_a_label_makes_no_two_prompts_alike(tmp_path: Path) -> None:
    """Of what "ok" and "sure" hold with a long label, four fifths are the label."""
    near = "i would like to change the seat on my flight to chennai tomorrow"
    prompts = ["ok", "sure", "yes", near, near + " please"]
    result, kept = clean(tmp_path, [chat(prompt, "confirmation") for prompt in prompts])
    assert result.dropped == {"near_duplicate": 1}
    assert len(kept) == 4


def test_labels_get_one_spelling(tmp_path: Path) -> None:
    sentences = Sentences()
    labels = ["joy"] * 9 + ["Joy", "JOY."] + ["anger"] * 9
    result, kept = clean(tmp_path, [chat(sentences.sentence(), label) for label in labels])
    assert kept == ["joy"] * 11 + ["anger"] * 9
    assert result.changed == {"label_spelling": 2}


def test_rules_on_request(tmp_path: Path) -> None:
    sentences = Sentences()
    text = sentences.sentence()
    rows = [
        chat("Do it?", "I'm sorry, but I can't help with that."),
        chat(text, "joy"),
        chat(text.upper(), "anger"),
    ]
    rows += [chat(sentences.sentence(), "joy") for _ in range(3)]
    assert clean(tmp_path, rows)[0].folder is None
    result, kept = clean(tmp_path, rows, "refusal", "conflicting_answers")
    assert kept == ["joy"] * 4
    assert result.dropped == {"refusal": 1, "conflicting_answers": 1}


def test_rows_of_a_test_set_are_left_out(tmp_path: Path) -> None:
    sentences = Sentences()
    rows = [sentences.row() for _ in range(4)]
    near = chat(rows[1]["messages"][0]["content"], rows[1]["messages"][1]["content"] + " Yes.")
    asked = chat(rows[2]["messages"][0]["content"].lower(), sentences.answer())
    test = write(tmp_path / "test.jsonl", rows[:3])
    path = write(tmp_path / "train.jsonl", [rows[0], near, asked, rows[3]])
    result = clean_file(path, tmp_path / "clean", CleanOptions(test_file=test))
    assert result.dropped == {"leak_row": 2, "leak_prompt": 1}
    assert result.file is not None
    assert answers(result.file) == [rows[3]["messages"][1]["content"]]


def test_weights_and_documents_are_kept(tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": "a", "weight": 0}, {"role": "user", "content": "b"}]
    row = {"messages": [*turns, {"role": "assistant", "content": "CafÃ©"}]}
    result, _ = clean(tmp_path, [row, {"text": "a text"}])
    assert result.file is not None
    first, second = map(json.loads, result.file.read_text("utf-8").splitlines())
    assert first["messages"][0] == turns[0]
    assert second == {"text": "a text"}


def test_rows_of_one_line_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([chat("a", "same"), chat("b", "CafÃ©"), chat("a", "same")]), "utf-8")
    result = clean_file(path, tmp_path / "clean", CleanOptions())
    assert [(change.line, change.rule) for change in result.changes] == [
        (2, "mojibake"),
        (3, "exact_duplicate"),
    ]


def test_a_dry_cleaning_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [chat("a", "CafÃ©")])
    result = clean_file(path, tmp_path / "clean", CleanOptions(), is_dry=True)
    assert (result.folder, result.changed) == (None, {"mojibake": 1})
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row"):
        clean(tmp_path, [chat("a", BOILERPLATE[0])])
    assert not (tmp_path / "clean").exists()


@pytest.mark.parametrize(
    ("rule", "told"), [("mojibak", "mojibake"), ("low_variety", "choose among"), ("x", "choose")]
)
def test_a_rule_that_cannot_be_applied_is_named(rule: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        chosen_rules((rule,), (), ())
    assert told in caught.value.do


def test_the_rules_that_clean_say_what_they_do() -> None:
    assert all(RULES[rule].can_clean for rule in (*DEFAULT_RULES, *ON_REQUEST))


def test_after_cleaning_nothing_of_its_rules_is_found(tmp_path: Path) -> None:
    rng, sentences = random.Random(4), Sentences()
    rows: list[Any] = [sentences.row() for _ in range(60)]
    for plant in IN_ROWS.values():
        rows += [line for _ in range(4) for line in plant(sentences.row(), rng, sentences)]
    rows += [broken("role", sentences.row()), broken("empty_system", sentences.row())]
    rng.shuffle(rows)
    result, _ = clean(tmp_path, rows)
    assert result.file is not None
    report = check_file(result.file)
    assert report.is_sound
    assert not set(report.counts) & set(DEFAULT_RULES)


WORDS = st.sampled_from(
    ["Joy", "joy.", "anger", "CafÃ©", "Ã", "©", "â€™", "<b>", "</b>", "&amp;", "&", "amp;", "lt;", "<", "p>", "``", "`",
     PRIVATE[0], PRIVATE[1], "4111", "1111", "@", "example.org", "ann", BOILERPLATE[0], "the same sentence once more",
     "[EMAIL_1]", "key=", "a1b2c3d4e5f6", SECRETS[0], "\n", "1.2.3.4", "ÃƒÂ©", "İ", "ß"]
)  # fmt: skip
TEXTS = st.lists(WORDS, min_size=1, max_size=6).flatmap(
    lambda words: st.sampled_from([" ".join(words), "".join(words)])
)
ROWS = st.lists(
    st.builds(chat, TEXTS, TEXTS) | st.builds(lambda text: {"text": text}, TEXTS), min_size=1, max_size=8
)


@settings(max_examples=150)
@given(ROWS)
def test_cleaning_twice_changes_nothing(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    options = CleanOptions(rules=tuple(rule for rule in DEFAULT_RULES))
    try:
        first = clean_file(write(folder / "train.jsonl", rows), folder / "one", options)
    except DataError:
        return
    if first.file is None:
        return
    second = clean_file(first.file, folder / "two", options)
    assert second.changes == ()
    assert second.folder is None
    assert not [item for item in read_examples(first.file) if isinstance(item, Finding) and item.is_error]


def test_labels_are_cleaned_like_answers(tmp_path: Path) -> None:
    sentences = Sentences()
    rows: list[Any] = [{"text": sentences.sentence(), "label": name} for name in ("late", "lost") * 30]
    rows += [{"text": sentences.sentence(), "label": "Late."}, dict(rows[0]), {**rows[1], "label": "late"}]
    rows.append({"messages": [{"role": "user", "content": "<p>Where &amp; when?</p>"}], "label": "lost"})
    path = write(tmp_path / "train.jsonl", rows)
    report = check_file(path)
    assert report.counts["label_spelling"] == report.counts["conflicting_answers"] == 1
    assert report.counts["exact_duplicate"] == report.counts["html"] == 1
    assert report.num_errors == 0
    result = clean_file(path, tmp_path / "clean", CleanOptions())
    assert result.file is not None
    kept = [json.loads(line) for line in result.file.read_text("utf-8").splitlines()]
    assert len(kept) == 63
    assert {row["label"] for row in kept} == {"late", "lost"}
    assert kept[-1]["messages"][0]["content"] == "Where & when?"
    assert not clean_file(result.file, tmp_path / "again", CleanOptions()).changes


def test_no_label_is_lost_in_another_form(tmp_path: Path) -> None:
    rows = [{"text": "One text.", "label": "a"}, {"text": "Another one.", "label": "b"}]
    path = write(tmp_path / "a.jsonl", rows)
    convert_file(path, tmp_path / "a.csv")
    convert_file(tmp_path / "a.csv", tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_text("utf-8") == path.read_text("utf-8")
    with pytest.raises(DataError, match="does not fit into plain text"):
        convert_file(path, tmp_path / "a.txt")
    chats = write(tmp_path / "c.jsonl", [{**chat("Who?", "I."), "label": "a"}])
    for form in ("sharegpt", "alpaca", "pairs"):
        with pytest.raises(DataError, match="does not fit"):
            convert_file(chats, tmp_path / f"{form}.jsonl", form=form)
    named = ReadOptions(columns=column_options(["text=body", "label=kind"]))
    table = tmp_path / "d.csv"
    table.write_text("body,kind\nOne text.,a\nAnother one.,b\n", "utf-8")
    convert_file(table, tmp_path / "d.jsonl", options=named)
    assert (tmp_path / "d.jsonl").read_text("utf-8") == path.read_text("utf-8")
