"""`phinetune classify` names the class of each text; train, evaluate and report speak of classes too."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from labelled_project import write_labelled_set

from phinetune.cli import main

SETTINGS = (
    "task=classification", "finetune_dataset=labelled", "num_training_steps=30", "learning_rate=0.02",
    "finetune_train_seqlen=32", "finetune_train_batch_size=2", "eval_steps=10", "save_steps=10",
    "lora_dropout=0.0", "device=cpu", "dtype=float32",
)  # fmt: skip


def run(*arguments: str | Path) -> int:
    return main.run([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def classifier(project: Path) -> Path:
    write_labelled_set(project / "labelled")
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    assert run("train", project, "--run", "classifier", "--yes", *options) == 0
    return project / "runs" / "classifier"


def test_each_text_gets_its_class_and_the_next_ones(
    classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("classify", classifier, "red two cups", "blue five") == 0
    red, blue = capsys.readouterr().out.splitlines()
    assert red.startswith("red ")
    assert red.endswith("<-  red two cups")
    assert blue.startswith("blue ")


def test_lines_of_standard_input_come_out_as_json(
    classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("green one\n\nred five\n"))
    assert run("classify", classifier, "--json") == 0
    found = json.loads(capsys.readouterr().out)["classes"]
    assert [(entry["text"], entry["label"]) for entry in found] == [
        ("green one", "green"),
        ("red five", "red"),
    ]
    assert all(0.34 < entry["probability"] <= 1 for entry in found)


def test_evaluate_and_report_speak_of_accuracy_and_macro_f1(
    classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("evaluate", "report"):
        assert run(command, classifier) == 0
        out = capsys.readouterr().out
        for part in ("accuracy", "macro-F1", "better (95 % interval", "phinetune classify"):
            assert part in out
    page = (classifier / "report.html").read_text("utf-8")
    assert "macro-F1" in page


def test_chat_with_a_classifier_says_what_it_is_for(
    classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("chat", classifier) == 2
    err = capsys.readouterr().err
    assert "classifier" in err
    assert "phinetune classify" in err
