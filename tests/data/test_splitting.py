"""Splits keep what is alike together and classes in shape; files are converted without a loss."""

# ruff: noqa: E501 (lists of cases read best with few breaks)
from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_faults import NOUNS, Sentences, chat

from phinetune.base.errors import DataError, SettingsError, UserError
from phinetune.base.files import manifest_fault
from phinetune.data.changing.splitting import (
    convert_file,
    merge_files,
    sample_file,
    split_file,
)
from phinetune.data.checking import CheckOptions, check_file
from phinetune.data.conversation import Conversation
from phinetune.data.reading import load_examples


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def contents(path: Path) -> list[tuple[str, ...]]:
    return [
        tuple(message.content for message in example.messages)
        if isinstance(example, Conversation)
        else (example.text,)
        for example in load_examples(path)
    ]


def rows_with_doubles(seed: int, count: int) -> list[Any]:
    rng = random.Random(seed)
    sentences = Sentences(rng)
    rows = [sentences.row() for _ in range(count)]
    for row in rows[: count // 3]:
        words = row["messages"][1]["content"].split()
        words[rng.randrange(len(words))] = rng.choice(NOUNS)
        rows.append(chat(row["messages"][0]["content"], " ".join(words)))
    rows += [chat(row["messages"][0]["content"].upper(), sentences.answer()) for row in rows[: count // 4]]
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_a_split_leaks_nothing(seed: int, tmp_path: Path) -> None:
    rows = rows_with_doubles(seed, 120)
    result = split_file(
        write(tmp_path / "a.jsonl", rows), tmp_path / "d", {"test": 0.2, "valid": 0.1}, seed=seed
    )
    train = tmp_path / "d" / "train.jsonl"
    for part in ("test", "valid"):
        report = check_file(train, CheckOptions(test_file=tmp_path / "d" / f"{part}.jsonl"))
        assert not {"leak_row", "leak_prompt"} & report.counts.keys()
    assert sum(result.rows.values()) == len(rows)
    assert abs(result.rows["test"] / len(rows) - 0.2) < 0.03
    assert manifest_fault(result.folder) == ""
    recipe = json.loads((result.folder / "recipe.json").read_text("utf-8"))
    assert (recipe["seed"], recipe["shares"]) == (seed, {"test": 0.2, "valid": 0.1})


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    rows = rows_with_doubles(7, 60)
    parts = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        split_file(write(tmp_path / f"{name}.jsonl", order), tmp_path / name, {"test": 0.25}, seed=1)
        parts.append(set(contents(tmp_path / name / "test.jsonl")))
    assert parts[0] == parts[1]
    split_file(tmp_path / "a.jsonl", tmp_path / "c", {"test": 0.25}, seed=2)
    assert set(contents(tmp_path / "c" / "test.jsonl")) != parts[0]


def test_classes_keep_their_shares(tmp_path: Path) -> None:
    sentences = Sentences()
    rows = [
        chat(sentences.sentence(), label)
        for label, count in (("joy", 200), ("fear", 40))
        for _ in range(count)
    ]
    result = split_file(write(tmp_path / "a.jsonl", rows), tmp_path / "d", {"test": 0.2}, seed=3)
    assert result.classes["test"] == {"joy": 40, "fear": 8}
    assert result.classes["train"] == {"joy": 160, "fear": 32}


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("a", "b"), chat("a", "c")])
    with pytest.raises(DataError, match="would be empty"):
        split_file(path, tmp_path / "d", {"test": 0.5}, seed=0)
    for share in (0, 1, -1):
        with pytest.raises(SettingsError):
            split_file(path, tmp_path / "d", {"test": share}, seed=0)
    with pytest.raises(UserError, match="there already"):
        split_file(path, tmp_path, {"test": 0.5}, seed=0)
    path.write_text("broken\n", "utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        split_file(path, tmp_path / "d", {"test": 0.5}, seed=0)
    assert not (tmp_path / "d").exists()


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda text: text.strip() and "\0" not in text
)
FORMS = [
    (".jsonl", "messages"), (".jsonl", "sharegpt"), (".jsonl", "alpaca"), (".jsonl", "pairs"), (".json", "messages"),
    (".json", "pairs"), (".csv", "messages"), (".tsv", "messages"), (".parquet", "messages"), (".parquet", "pairs"),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "form"), FORMS)
@settings(max_examples=20)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_converted_and_back_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, form: str, pairs: list[tuple[str, str]]
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    # A table cannot tell a carriage return from the end of a line.
    pairs = (
        [(a.replace("\r", " "), b.replace("\r", " ")) for a, b in pairs]
        if suffix in (".csv", ".tsv")
        else pairs
    )
    pairs = [(a, b) for a, b in pairs if a.strip() and b.strip()]
    folder = tmp_path_factory.mktemp("convert")
    path = write(folder / "a.jsonl", [chat(a, b) for a, b in pairs] or [chat("a", "b")])
    there, back = folder / f"there{suffix}", folder / "back.jsonl"
    convert_file(path, there, form=form)
    convert_file(there, back)
    assert contents(back) == contents(path)
    assert json.loads((folder / f"there{suffix}.recipe.json").read_text("utf-8"))["form"] == form


def test_what_a_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    path = write(
        tmp_path / "a.jsonl", [{"messages": [*turns, *turns[:1], {"role": "assistant", "content": "c"}]}]
    )
    for name, form in (
        ("a.csv", "messages"),
        ("b.jsonl", "alpaca"),
        ("b.jsonl", "sharegpt"),
        ("a.txt", "messages"),
    ):
        with pytest.raises(DataError, match="does not fit"):
            convert_file(path, tmp_path / name, form=form)
        assert not (tmp_path / name).exists()
    with pytest.raises(SettingsError):
        convert_file(path, tmp_path / "b.xlsx")
    with pytest.raises(SettingsError, match="alpca"):
        convert_file(path, tmp_path / "b.jsonl", form="alpca")
    with pytest.raises(UserError, match="there already"):
        convert_file(path, path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_sample_follows_its_seed(tmp_path: Path) -> None:
    rows = [chat(f"question {number}", f"answer {number}") for number in range(50)]
    path = write(tmp_path / "a.jsonl", rows)
    assert sample_file(path, tmp_path / "b.jsonl", 10, seed=1) == 10
    assert sample_file(path, tmp_path / "c.jsonl", 10, seed=1) == 10
    assert sample_file(path, tmp_path / "d.jsonl", 99, seed=1) == 50
    drawn = contents(tmp_path / "b.jsonl")
    assert drawn == contents(tmp_path / "c.jsonl")
    assert drawn == [entry for entry in contents(path) if entry in drawn]


def test_a_balanced_sample_has_as_many_of_each_class(tmp_path: Path) -> None:
    sentences = Sentences()
    rows = [
        chat(sentences.sentence(), label)
        for label, count in (("joy", 60), ("fear", 20))
        for _ in range(count)
    ]
    path = write(tmp_path / "a.jsonl", rows)
    assert sample_file(path, tmp_path / "b.jsonl", 30, seed=1, is_balanced=True) == 30
    assert Counter(answer for _, answer in contents(tmp_path / "b.jsonl")) == {"joy": 15, "fear": 15}
    with pytest.raises(DataError, match="no classes"):
        sample_file(
            write(tmp_path / "c.jsonl", [sentences.row()] * 3),
            tmp_path / "d.jsonl",
            2,
            seed=1,
            is_balanced=True,
        )


def test_merging_leaves_out_what_stood_before(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [chat("a", "b"), chat("c", "d")])
    two = write(tmp_path / "b.jsonl", [chat("C", "d "), chat("e", "f")])
    counts = merge_files([one, two], tmp_path / "c.jsonl")
    assert counts == {str(one): {"rows": 2, "left_out": 0}, str(two): {"rows": 1, "left_out": 1}}
    assert contents(tmp_path / "c.jsonl") == [("a", "b"), ("c", "d"), ("e", "f")]
