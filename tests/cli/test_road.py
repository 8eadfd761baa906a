"""The commands on a real, tiny run: each ends with a result, and says the same as the run itself."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from colour_chats import write_chats

import phinetune
from phinetune.base.errors import UserError
from phinetune.base.events import Finished
from phinetune.cli import main


def run(*arguments: str | Path) -> int:
    return main.run([str(argument) for argument in arguments])


def summary_of(run_folder: Path) -> dict[str, Any]:
    return dict(json.loads((run_folder / "summary.json").read_text("utf-8")))


def test_train_prints_summary_json_and_nothing_else(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", project, "--run", "json", "--json", "--set", "num_training_steps=2") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == summary_of(project / "runs" / "json")
    assert json.loads(captured.out)["steps"] == 2
    assert "step 2/2" in captured.err


def test_train_ends_with_the_proof_and_the_next_commands(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", project, "--run", "shown", "--yes") == 0
    out = capsys.readouterr().out
    for part in ("loss", "exact match", "difference [95 %]", "adapter", "report.html", "phinetune chat"):
        assert part in out


def test_a_run_may_begin_with_the_adapter_of_another(
    run_folder: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--run", "further", "--yes", "--from-adapter", run_folder)
    assert run("train", project, *arguments) == 0
    err = capsys.readouterr().err
    assert "training goes on from" in err
    assert "start     test loss" in err
    assert "base      test loss" not in err
    assert summary_of(project / "runs" / "further")["lineage"][0]["run_id"] == run_folder.name


def test_new_takes_a_preset_and_refuses_an_unknown_one(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = project / "dataset"
    files = ("--model", "demo", "--train", data / "train.json", "--test", data / "test.json")
    assert run("new", tmp_path / "p", *files, "--preset", "phi-silica") == 0
    assert "template of the AI Toolkit" in capsys.readouterr().out
    assert "\nfinetune_train_seqlen: 1024\n" in (tmp_path / "p" / "lora" / "lora.yaml").read_text()
    assert run("new", tmp_path / "q", *files, "--preset", "phi-silca") == 2
    assert "write 'phi-silica'" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_a_taken_run_name_is_refused(
    run_folder: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", project, "--run", run_folder.name) == 2
    assert "there is a run named 'first' already" in capsys.readouterr().err


def test_an_unknown_setting_makes_no_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((project / "runs").iterdir()) if (project / "runs").exists() else []
    assert run("train", project, "--set", "learning_rat=1") == 2
    assert "write 'learning_rate'" in capsys.readouterr().err
    assert before == (sorted((project / "runs").iterdir()) if (project / "runs").exists() else [])


def test_evaluating_again_gives_the_figures_of_the_run(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", run_folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["evaluation"] == summary_of(run_folder)["evaluation"]


def test_evaluating_on_another_file_counts_that_file(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chats(tmp_path / "other.json", ("violet", "orange"))
    assert run("evaluate", run_folder, "--data", tmp_path / "other.json", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [answer["reference"] for answer in report["answers"]] == ["violet", "orange"]
    assert report["evaluation"] != summary_of(run_folder)["evaluation"]


def test_a_test_set_that_changed_is_refused(
    run_folder: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test_file = project / "dataset" / "test.json"
    before = test_file.read_bytes()
    test_file.write_bytes(before + before)
    try:
        assert run("evaluate", run_folder) == 2
    finally:
        test_file.write_bytes(before)
    assert "the test set has changed since this run" in capsys.readouterr().err


def test_compare_answers_given_prompts(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("compare", run_folder, "--prompt", "The cup is red.", "--max-new-tokens", "3", "--json")
    assert run(*arguments) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["prompt"] == [
        {"role": "system", "content": "Name the colour."},
        {"role": "user", "content": "The cup is red."},
    ]
    assert answer["reference"] is None
    model = phinetune.load(run_folder, dtype="float32")
    for side in ("base", "adapter"):
        assert answer[side] == model.chat("The cup is red.", with_adapter=side == "adapter", max_new_tokens=3)


def test_compare_reads_prompts_from_a_file(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert run("compare", run_folder, tmp_path / "prompts.txt", "--max-new-tokens", "2", "--json") == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["prompt"][-1]["content"] for answer in answers] == ["one", "two"]


def test_compare_without_prompts_takes_the_test_set(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", run_folder, "--max-new-tokens", "2") == 0
    out = capsys.readouterr().out
    assert out.count("reference") == 3
    assert "The door is red." in out


def test_comparing_a_base_with_nothing_is_refused(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", tiny_model, "--prompt", "x") == 2
    assert "has no adapter" in capsys.readouterr().err


def test_chat_streams_what_the_model_answers(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The cup is red.\n/exit\n"))
    assert run("chat", run_folder, "--max-new-tokens", "4") == 0
    captured = capsys.readouterr()
    assert captured.out == phinetune.load(run_folder).chat("The cup is red.", max_new_tokens=4) + "\n"
    assert "system message: Name the colour." in captured.err


def test_chat_talks_with_a_base_alone(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert run("chat", tiny_model, "--max-new-tokens", "2") == 0
    assert "without an adapter" in capsys.readouterr().err


def test_report_is_written_anew(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run_folder / "report.html"
    pages = []
    for _ in range(2):
        page.unlink()
        assert run("report", run_folder) == 0
        assert "report.html" in capsys.readouterr().out
        pages.append(page.read_text("utf-8"))
    assert pages[0] == pages[1]
    assert run_folder.name in pages[0]


def test_report_json_is_the_summary(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", run_folder, "--json") == 0
    assert json.loads(capsys.readouterr().out) == summary_of(run_folder)


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("report", "evaluate", "compare"):
        assert run(command, tmp_path) == 2
        assert "there is no run here" in capsys.readouterr().err


def test_the_python_door_yields_events_and_loads_a_project(project: Path, run_folder: Path) -> None:
    events = list(phinetune.train(project, run_name="python", settings={"num_training_steps": "2"}))
    assert isinstance(events[-1], Finished)
    assert phinetune.load(project).has_own_adapter
    assert phinetune.load(run_folder / "adapter").adapters == ["adapter"]


def test_loading_what_is_not_there_is_the_users_error() -> None:
    with pytest.raises(UserError):
        phinetune.load("./no-such-folder")
