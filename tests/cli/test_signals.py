"""Ctrl-C and SIGTERM: the first lets the run save where it is, the second ends it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from phinetune.cli import main
from phinetune.cli.signals import WAITING, asking
from phinetune.runs.folder import find_run
from phinetune.runs.stopping import StopRequest
from phinetune.training import loop

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture
def send_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends signals to this process while a step is being made."""
    original = loop.train_step

    def prepare(step: int, *numbers: int) -> None:
        waiting = list(numbers)

        def train_step(*args: object, **kwargs: object) -> object:
            if kwargs["step"] == step:
                while waiting:
                    os.kill(os.getpid(), waiting.pop(0))
            return original(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "train_step", train_step)

    return prepare


@pytest.mark.parametrize(("number", "exit_code"), SIGNALS)
def test_the_first_signal_finishes_the_step_and_saves(
    number: int,
    exit_code: int,
    project: Path,
    send_in_step: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    send_in_step(3, number)
    assert main.run(["train", str(project), "--run", f"stopped-{number}"]) == exit_code
    error = capfd.readouterr().err
    run = find_run(project / "runs" / f"stopped-{number}")
    assert run.status() == "interrupted"
    assert run.checkpoint(3).is_dir()
    assert not run.adapter.exists()
    assert WAITING.decode().strip() in error
    assert "interrupted at step 3; the last checkpoint is kept" in " ".join(error.split())
    assert f"phinetune train {project} --resume" in " ".join(error.split())
    assert signal.getsignal(number) is before

    assert main.run(["train", str(project), "--run", run.run_id, "--resume", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["run_id"] == run.run_id
    assert "resumed  after step 3" in captured.err


@pytest.mark.parametrize(("number", "exit_code"), SIGNALS)
def test_the_second_signal_stops_now(
    number: int, exit_code: int, project: Path, send_in_step: Callable[..., None]
) -> None:
    send_in_step(3, number, number)
    assert main.run(["train", str(project), "--run", f"now-{number}"]) == exit_code
    run = find_run(project / "runs" / f"now-{number}")
    assert run.status() == "interrupted"
    assert run.checkpoint(2).is_dir()
    assert not run.checkpoint(3).exists()


def test_where_nobody_would_look_a_signal_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), asking(StopRequest()):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_finished_run_is_shown_again(run_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    project = run_folder.parent.parent
    assert main.run(["train", str(project), "--run", "first", "--resume", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["run_id"] == "first"
    assert "'first' is finished" in " ".join(captured.err.split())


def test_a_changed_setting_is_the_users_input(project: Path, send_in_step: Callable[..., None]) -> None:
    send_in_step(3, signal.SIGINT)
    assert main.run(["train", str(project), "--run", "changed"]) == 130
    assert main.run(["train", str(project), "--run", "changed", "--resume", "--set", "seed=1"]) == 2
