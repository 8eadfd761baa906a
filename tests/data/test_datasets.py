"""A data set's name leads to its files, or to an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from phinetune.base.errors import DataError
from phinetune.data.reading import resolve_dataset


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("x", "utf-8")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
def test_a_folder_holds_train_and_test(suffix: str, tmp_path: Path) -> None:
    touch(tmp_path / "dataset", f"train{suffix}", f"test{suffix}")
    files = resolve_dataset("dataset", tmp_path)
    assert files.train == tmp_path / "dataset" / f"train{suffix}"
    assert files.test == tmp_path / "dataset" / f"test{suffix}"


def test_a_test_file_may_be_missing(tmp_path: Path) -> None:
    touch(tmp_path / "dataset", "train.json")
    assert resolve_dataset("dataset", tmp_path).test is None


def test_a_file_is_a_training_set(tmp_path: Path) -> None:
    touch(tmp_path, "mine.jsonl")
    files = resolve_dataset(str(tmp_path / "mine.jsonl"), Path("elsewhere"))
    assert (files.train, files.test) == (tmp_path / "mine.jsonl", None)


def test_two_training_files_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "dataset", "train.json", "train.jsonl")
    with pytest.raises(DataError, match="two files") as caught:
        resolve_dataset("dataset", tmp_path)
    assert "train.json and train.jsonl" in caught.value.why


def test_a_misspelt_file_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "dataset", "trian.json")
    with pytest.raises(DataError, match=r"no train\.json") as caught:
        resolve_dataset("dataset", tmp_path)
    assert caught.value.do == "rename trian.json to train.json"


def test_the_test_file_is_never_taken_for_a_misspelt_training_file(tmp_path: Path) -> None:
    touch(tmp_path / "dataset", "test.json")
    with pytest.raises(DataError, match=r"no train\.json") as caught:
        resolve_dataset("dataset", tmp_path)
    assert caught.value.do == "put train.json there, and test.json if there is one"


def test_a_misspelt_name_offers_the_nearest(tmp_path: Path) -> None:
    touch(tmp_path / "dataset", "train.json")
    with pytest.raises(DataError) as caught:
        resolve_dataset("datset", tmp_path)
    assert "dataset" in caught.value.do
    with pytest.raises(DataError) as caught:
        resolve_dataset("wikitxt2", tmp_path)
    assert "wikitext2" in caught.value.do
