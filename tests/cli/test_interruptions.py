"""Stopping early says what was kept; quickstart makes one project and adds runs to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_up_run import PLAN, SUMMARY, made_up_run, stepped

from phinetune.base import events
from phinetune.cli import main
from phinetune.cli import train as train_command
from phinetune.runs import train_run as road
from phinetune.training.lora_yaml import load_settings
from phinetune.training.settings import QUICKSTART, TrainingSettings


def use(monkeypatch: pytest.MonkeyPatch, run: Iterator[events.Event]) -> None:
    monkeypatch.setattr(road, "train_run", lambda project, **_: run)


def interrupted(*before: events.Event) -> Iterator[events.Event]:
    yield from before
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ((), "before training began; no adapter was kept"),
        ((stepped(3),), "at step 3, before the first checkpoint; no adapter was kept"),
        ((stepped(8), events.Saved(step=8, path="run/step-8")), "the last checkpoint is kept: run/step-8"),
    ],
)
def test_interrupting_says_what_was_kept(
    before: tuple[events.Event, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(monkeypatch, interrupted(*before))
    assert main.run(["train", "somewhere"]) == 130
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert captured.err.count("interrupted") == 1
    assert captured.out == ""


def test_saying_no_closes_the_run_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = []

    def run() -> Iterator[events.Event]:
        try:
            yield from made_up_run()
        finally:
            closed.append(True)

    use(monkeypatch, run())
    monkeypatch.setattr(train_command, "is_wanted", lambda plan: False)
    assert main.run(["train", "somewhere"]) == 0
    assert closed == [True]
    assert "not started" in capsys.readouterr().err


def test_nobody_is_asked_without_a_terminal() -> None:
    assert train_command.is_wanted(PLAN) is True


def test_quickstart_makes_a_project_and_shows_the_headline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    use(monkeypatch, made_up_run())
    assert main.run(["quickstart", str(tmp_path / "first")]) == 0
    out = capsys.readouterr().out
    assert "exact match: base 0.0 %, adapter 91.5 %: better" in out
    assert "phinetune chat" in out
    settings = load_settings(tmp_path / "first" / "lora" / "lora.yaml")
    assert settings == TrainingSettings(**QUICKSTART)
    assert (tmp_path / "first" / "dataset" / "train.json").is_file()


def test_quickstart_again_adds_a_run_to_the_same_project(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for _ in range(2):
        use(monkeypatch, made_up_run())
        assert main.run(["quickstart", str(tmp_path / "p"), "--json"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out) == SUMMARY
    assert "a further run in it" in " ".join(captured.err.split())


def test_quickstart_leaves_other_folders_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    assert main.run(["quickstart", str(tmp_path)]) == 2
    assert "already holds something else" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
