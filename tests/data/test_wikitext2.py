"""WikiText-2 comes from the user's folder or the hub, or the error names the folder to fill."""

from __future__ import annotations

import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from phinetune.base.errors import DataError
from phinetune.data.conversation import PlainText
from phinetune.data.reading import load_examples, resolve_dataset

ROWS = ["", " = Title = \n", "", " A first line of text .\n", " A second line .\n"]


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("x", "utf-8")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with the two files of WikiText-2; the names of those that were fetched."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    fetched: list[str] = []

    def download(repo: str, name: str, *, repo_type: str) -> str:
        assert (repo, repo_type) == ("Salesforce/wikitext", "dataset")
        fetched.append(name)
        parquet.write_table(arrow.table({"text": ROWS}), tmp_path / "rows.parquet")
        return str(tmp_path / "rows.parquet")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("PHINETUNE_DATA", raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return fetched


WIKITEXT_NAMES = [
    ("train.txt", "test.txt"),
    ("wiki.train.tokens", "wiki.test.tokens"),
    ("wiki.train.raw", "wiki.valid.raw"),
]


@pytest.mark.parametrize("names", WIKITEXT_NAMES)
def test_wikitext2_is_found_by_name(
    names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHINETUNE_DATA", str(tmp_path))
    touch(tmp_path / "wikitext-2", *names)
    files = resolve_dataset("wikitext2", tmp_path / "project")
    assert (files.train.name, files.test.name if files.test else "") == names


def test_wikitext2_that_is_not_here_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHINETUNE_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        resolve_dataset("wikitext2", tmp_path)
    assert caught.value.where == str(tmp_path / "wikitext-2")
    assert str(tmp_path / "wikitext-2") in caught.value.do
    monkeypatch.delenv("PHINETUNE_DATA")
    with pytest.raises(DataError) as caught:
        resolve_dataset("wikitext2", tmp_path)
    assert "PHINETUNE_DATA" in caught.value.do


def test_wikitext2_is_fetched_once_from_the_hub(hub: list[str], tmp_path: Path) -> None:
    files = resolve_dataset("wikitext2", tmp_path)
    assert files.test is not None
    assert files.train.read_text("utf-8") == "".join(ROWS)
    (example,) = load_examples(files.train)
    assert isinstance(example, PlainText)
    assert resolve_dataset("wikitext2", tmp_path) == files
    assert [name.split("/")[1].split("-")[0] for name in hub] == ["train", "test"]


@pytest.mark.usefixtures("hub")
def test_a_hub_that_cannot_be_reached_names_the_folder_to_fill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(repo: str, name: str, *, repo_type: str) -> str:
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(DataError, match="could not be fetched") as caught:
        resolve_dataset("wikitext2", tmp_path)
    assert caught.value.why == "no connection"
    assert "PHINETUNE_DATA" in caught.value.do


@pytest.mark.usefixtures("hub")
def test_a_missing_parquet_reader_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError) as caught:
        resolve_dataset("wikitext2", tmp_path)
    assert caught.value.do.startswith("pip install pyarrow")
