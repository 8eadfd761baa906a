"""A new project is whole or absent, and never written over anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phinetune.base.errors import DataError, UserError
from phinetune.base.files import manifest_fault
from phinetune.data.reading import resolve_dataset
from phinetune.runs import project as project_module
from phinetune.runs.project import create_project, is_project
from phinetune.training.lora_yaml import load_settings
from phinetune.training.settings import TrainingSettings

LINE = (
    json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
)
SETTINGS = TrainingSettings(finetune_dataset="dataset", learning_rate=3e-4)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {"train": tmp_path / "mine.jsonl", "test": tmp_path / "other.json"}
    paths["train"].write_text(LINE * 3, encoding="utf-8")
    paths["test"].write_text(LINE, encoding="utf-8")
    return paths


def test_a_project_holds_settings_and_copies_with_hashes(tmp_path: Path, files: dict[str, Path]) -> None:
    made = create_project(tmp_path / "p", SETTINGS, **files)
    assert (made.num_train, made.num_test) == (3, 1)
    assert load_settings(tmp_path / "p" / "lora" / "lora.yaml") == SETTINGS
    dataset = tmp_path / "p" / "dataset"
    assert (dataset / "train.jsonl").read_bytes() == files["train"].read_bytes()
    assert (dataset / "test.json").read_bytes() == files["test"].read_bytes()
    assert manifest_fault(dataset) == ""
    assert is_project(tmp_path / "p")


def test_without_a_test_file_a_fifth_becomes_one(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(50)]
    train = tmp_path / "mine.json"
    train.write_text(json.dumps(rows), encoding="utf-8")
    made = create_project(tmp_path / "p", SETTINGS, train=train, test=None)
    assert (made.num_train, made.num_test) == (40, 10)
    recipe = json.loads((tmp_path / "p" / "dataset" / "recipe.json").read_text("utf-8"))
    assert (recipe["shares"], recipe["seed"]) == ({"test": 0.2}, SETTINGS.seed)
    files = resolve_dataset("dataset", tmp_path / "p")
    assert (files.train, files.test) == (made.train, tmp_path / "p" / "dataset" / "test.jsonl")


def test_an_empty_folder_may_become_a_project(tmp_path: Path, files: dict[str, Path]) -> None:
    (tmp_path / "p").mkdir()
    create_project(tmp_path / "p", SETTINGS, **files)
    assert is_project(tmp_path / "p")


def test_nothing_is_overwritten(tmp_path: Path, files: dict[str, Path]) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds something"):
        create_project(tmp_path / "p", SETTINGS, **files)
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["notes.txt"]


def test_faulty_data_makes_no_project(tmp_path: Path, files: dict[str, Path]) -> None:
    files["train"].write_text(LINE + "{broken\n" + LINE, encoding="utf-8")
    with pytest.raises(DataError):
        create_project(tmp_path / "p", SETTINGS, **files)
    assert not (tmp_path / "p").exists()


def test_a_missing_file_is_named(tmp_path: Path, files: dict[str, Path]) -> None:
    files["test"].unlink()
    with pytest.raises(UserError, match="no test file"):
        create_project(tmp_path / "p", SETTINGS, **files)
    assert not (tmp_path / "p").exists()


def test_an_unknown_ending_is_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    files["test"] = files["test"].rename(tmp_path / "other.xlsx")
    with pytest.raises(UserError, match="unknown kind of name"):
        create_project(tmp_path / "p", SETTINGS, **files)


def test_a_failure_half_way_leaves_nothing(
    tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(project_module, "write_atomically", no_space)
    with pytest.raises(OSError, match="No space"):
        create_project(tmp_path / "p", SETTINGS, **files)
    assert not (tmp_path / "p").exists()
