"""The command line answers mistakes with what, where, why and do, and the agreed exit codes."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phinetune.base.errors import DataError, RunError, UserError
from phinetune.cli import console, main


def run(*arguments: str) -> int:
    return main.run(arguments)


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Let `phinetune doctor` raise an error of the test's choice."""

    def use(error: BaseException) -> int:
        import phinetune.cli.machine as machine

        def raise_it() -> None:
            raise error

        monkeypatch.setattr(machine, "inspect_machine", raise_it)
        return run("doctor")

    return use


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == "phinetune 0.1.0\n"


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert "quickstart" in capsys.readouterr().out


def test_a_group_without_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data") == 0
    captured = capsys.readouterr()
    assert "preview" in captured.out
    assert captured.err == ""


def test_unknown_command_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trian") == 2
    error = capsys.readouterr().err
    assert "there is no command 'trian'" in error
    assert "write 'phinetune train'" in error


def test_unknown_subcommand_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "chek") == 2
    assert "write 'phinetune data check'" in capsys.readouterr().err


def test_unknown_option_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "x", "--jsn") == 2
    error = capsys.readouterr().err
    assert "'phinetune train' has no option '--jsn'" in error
    assert "write '--json'" in error


def test_missing_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train") == 2
    assert "missing argument 'project'" in capsys.readouterr().err.lower()


def test_bad_set_is_refused_with_an_example(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("train", str(tmp_path), "--set", "epochs") == 2
    assert "for example: --set learning_rate=1e-3" in capsys.readouterr().err


def test_setting_a_key_twice_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("train", str(tmp_path), "--set", "epochs=1", "--set", "epochs=2") == 2
    assert "'epochs' is set twice" in capsys.readouterr().err


def test_the_users_errors_exit_2_without_traceback(raising, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(UserError("bad [red]row[/red]", where="a.json:3", why="because", do="this")) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert [line.strip() for line in error.splitlines()[-4:]] == [
        "error:   bad [red]row[/red]",
        "where: a.json:3",
        "why:   because",
        "do:    this",
    ]


def test_many_findings_keep_their_lines(raising, capsys: pytest.CaptureFixture[str]) -> None:
    raising(DataError("2 faults", why="a.json:1: one\na.json:2: two"))
    error = capsys.readouterr().err.splitlines()
    assert error[-2].strip() == "why:   a.json:1: one"
    assert error[-1].strip() == "a.json:2: two"


def test_failed_runs_exit_1(raising) -> None:
    assert raising(RunError("the loss became NaN")) == 1


def test_a_missing_file_exits_2(raising, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(FileNotFoundError(2, "No such file or directory", "gone.json")) == 2
    assert "gone.json" in capsys.readouterr().err


def test_interrupting_exits_130(raising, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt()) == 130
    assert "interrupted" in capsys.readouterr().err


def test_unexpected_errors_leave_their_traceback_in_a_file(
    raising, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert raising(ZeroDivisionError("a fault of ours")) == 1
    error = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: a fault of ours" in error
    assert "Traceback" not in error
    (written,) = tmp_path.glob("phinetune-error-*.txt")
    assert "Traceback" in written.read_text("utf-8")


def test_json_is_ascii_where_the_stream_is_not_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    console.print_json({"text": "日本"})
    assert b"\\u65e5\\u672c" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_characters_the_terminal_lacks_never_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    console.prepare_streams()
    console.say("日本 − 4 → 5")
    assert stream.buffer.getvalue().split() == [b"??", b"-", b"4", b"->", b"5"]  # type: ignore[attr-defined]


def test_a_full_disk_says_where_temporary_files_lie(
    raising: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(OSError(errno.ENOSPC, "No space left on device")) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "the disk is full" in shown
    assert "TMPDIR" in shown
