"""`phinetune runs` lists, shows, compares, watches and deletes; nothing goes unasked or while it runs."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from phinetune.base.events import EventLog
from phinetune.cli import main
from phinetune.runs import watching


def run(*arguments: str | Path) -> int:
    return main.run([str(argument) for argument in arguments])


@pytest.fixture
def copies(run_folder: Path, project: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two finished runs of a project of their own, the second with another rate."""
    for name in ("a", "b"):
        shutil.copytree(run_folder, tmp_path / "p" / "runs" / name)
    shutil.copytree(project / "lora", tmp_path / "p" / "lora")
    record = tmp_path / "p" / "runs" / "b" / "run.json"
    content = json.loads(record.read_text())
    content["started"] += 60
    content["settings"]["learning_rate"] = 0.5
    record.write_text(json.dumps(content))
    return tmp_path / "p" / "runs" / "a", tmp_path / "p" / "runs" / "b"


def test_list_has_one_line_per_run_the_newest_first(
    copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    project = copies[0].parents[1]
    assert run("runs", "list", project) == 0
    out = capsys.readouterr().out
    assert out.index("b  ") < out.index("a  ")
    assert out.count("succeeded") == 2
    assert run("runs", "list", project, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [row["run_id"] for row in rows] == ["b", "a"]
    assert rows[0]["num_steps_done"] == 4


def test_list_says_where_tokenised_data_lies_and_how_much(
    copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    project = copies[0].parents[1]
    (project / "cache" / "entry").mkdir(parents=True)
    (project / "cache" / "entry" / "tokens.int32").write_bytes(bytes(3_000_000))
    (project / "cache" / "entry" / "key.json").write_bytes(b"")
    assert run("runs", "list", project) == 0
    out = capsys.readouterr().out.replace("\n", "")
    assert "tokenised data: 3 MB" in out
    assert str(project / "cache") in out


def test_list_of_an_untrained_project_says_how_to_begin(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project / "lora", tmp_path / "lora")
    assert run("runs", "list", tmp_path) == 0
    assert "phinetune train" in capsys.readouterr().out
    assert run("runs", "list", tmp_path / "lora") == 2
    assert "is not a project" in capsys.readouterr().err


def test_show_tells_settings_and_result(
    copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("runs", "show", copies[1]) == 0
    out = capsys.readouterr().out
    for part in ("succeeded", "learning_rate: 0.5", "lora_r: 4", "difference [95 %]", "--from-adapter"):
        assert part in out
    assert "adam_beta1" not in out  # at its default
    assert run("runs", "show", copies[1], "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["record"]["settings"]["learning_rate"] == 0.5
    assert shown["summary"]["steps"] == 4


def test_compare_shows_what_differs_beside_each_other(
    copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("runs", "compare", *copies) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "learning_rate" in line]
    assert line.split() == ["learning_rate", "0.001", "0.5"]
    assert "lora_r" not in out
    assert "token accuracy" in out
    assert run("runs", "compare", *copies, "--json") == 0
    assert json.loads(capsys.readouterr().out)["run_ids"] == ["a", "b"]
    assert run("runs", "compare", copies[0]) == 2


def test_watch_shows_the_run_as_train_does(
    copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("runs", "watch", copies[0]) == 0
    captured = capsys.readouterr()
    assert "step 4/4" in captured.err
    assert "best so far" in captured.err
    assert "difference [95 %]" in captured.out
    assert "run 'a': succeeded" in captured.out


def test_ctrl_c_ends_the_watching_and_not_the_run(
    copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching, "watch", interrupted)
    assert run("runs", "watch", copies[0]) == 130
    assert "run 'a' goes on" in capsys.readouterr().err


def test_delete_takes_the_runs_named_and_no_others(
    copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("runs", "delete", copies[0], copies[0], "--yes") == 0
    assert [path.name for path in copies[0].parent.iterdir()] == ["b"]
    captured = capsys.readouterr()
    assert captured.out.count("deleted") == 1
    assert "MB" in captured.err or "kB" in captured.err


def test_delete_asks_and_takes_no_for_an_answer(
    copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run("runs", "delete", copies[0]) == 2
    assert "--yes" in capsys.readouterr().err
    for answer, is_left in (("n\n", True), ("\n", True), ("y\n", False)):
        stdin = io.StringIO(answer)
        monkeypatch.setattr(stdin, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run("runs", "delete", copies[0]) == 0
        assert copies[0].exists() == is_left


def test_a_running_run_is_not_deleted_nor_any_named_with_it(
    copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    record = copies[1] / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    log = EventLog(copies[1] / "events.jsonl")
    assert run("runs", "delete", *copies, "--yes") == 2
    assert "run 'b' is running" in capsys.readouterr().err
    log.close()
    assert all(copy.exists() for copy in copies)
    assert run("runs", "delete", *copies, "--yes") == 0  # it had died without a word
    assert not any(copy.exists() for copy in copies)


def test_a_project_is_no_run_to_delete(copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("runs", "delete", copies[0].parents[1], "--yes") == 2
    assert "is not a run" in capsys.readouterr().err
    assert all(copy.exists() for copy in copies)
