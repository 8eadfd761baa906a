"""An adapter on a base of other weights: a command refuses before it computes, or says what was forced."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

import phinetune
from phinetune.base.errors import IncompatibleLowRankAdapter
from phinetune.cli import main


@pytest.fixture(scope="module")
def other_base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with one weight changed: names and shapes are those of the adapter's base."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("bases") / "other"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def moved_run(
    project: Path, run_folder: Path, other_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run, whose base has become another one."""
    copy = tmp_path_factory.mktemp("moved") / "project"
    shutil.copytree(project, copy)
    run_json = copy / "runs" / run_folder.name / "run.json"
    content = json.loads(run_json.read_text(encoding="utf-8"))
    content["settings"]["model"] = str(other_base)
    run_json.write_text(json.dumps(content), encoding="utf-8")
    return run_json.parent


COMMANDS = {
    "chat": ["chat", "RUN", "--max-new-tokens", "2"],
    "chat with a further adapter": ["chat", "BASE", "--adapter", "RUN", "--max-new-tokens", "2"],
    "compare": ["compare", "RUN", "--prompt", "red", "--max-new-tokens", "2"],
    "compare with a further adapter": [
        "compare", "BASE", "--adapter", "RUN", "--prompt", "red", "--max-new-tokens", "2"
    ],
    "evaluate": ["evaluate", "RUN"],
    "merge": ["adapter", "merge", "RUN", "OUT", "--base", "BASE"],
    "check": ["adapter", "check", "RUN", "--base", "BASE"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_another_base_unless_forced_and_prints_that(
    moved_run: Path,
    other_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    places = {"RUN": str(moved_run), "BASE": str(other_base), "OUT": str(tmp_path / "out")}
    words = [places.get(word, word) for word in COMMANDS[command]]
    monkeypatch.setattr("sys.stdin", io.StringIO("red\n"))
    assert main.run(words) == 2
    refused = capsys.readouterr()
    assert "the adapter belongs to another base model" in refused.err
    assert "--force-base" in refused.err
    assert refused.out == "", "nothing was answered"
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr("sys.stdin", io.StringIO("red\n"))
    assert main.run([*words, "--force-base"]) == 0
    forced = capsys.readouterr()
    said = " ".join(forced.err.split())
    assert "forced" in said
    assert "another base" in said
    assert "it was trained on weights" in said
    assert forced.out


def test_force_is_silent_where_nothing_had_to_be_forced(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["adapter", "check", str(run_folder), "--force-base"]) == 0
    assert "forced" not in capsys.readouterr().err


def test_the_python_door_refuses_and_forces_in_the_same_way(moved_run: Path) -> None:
    with pytest.raises(IncompatibleLowRankAdapter, match="another base model") as caught:
        phinetune.load(moved_run)
    assert "force_base=True" in caught.value.do
    model = phinetune.load(moved_run, force_base=True)
    assert "it was trained on weights" in model.forced["adapter"]
    assert isinstance(model.chat("red", max_new_tokens=2), str)
    with pytest.raises(IncompatibleLowRankAdapter):
        phinetune.evaluate(moved_run)
    assert "forced on another base" in phinetune.evaluate(moved_run, force_base=True).notes[0]


@pytest.mark.parametrize("command", ["chat", "compare", "evaluate"])
def test_force_does_not_hide_names_and_shapes_that_do_not_fit(
    moved_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "project"
    shutil.copytree(moved_run.parent.parent, copy)
    run = copy / "runs" / moved_run.name
    weights = run / "adapter" / "adapter_model.safetensors"
    renamed = {key.replace("o_proj", "out_proj"): value for key, value in load_file(weights).items()}
    save_file(renamed, weights, {"format": "pt"})
    monkeypatch.setattr("sys.stdin", io.StringIO("red\n"))
    assert main.run([command, str(run), "--force-base"]) == 2
    assert "which the base does not have" in " ".join(capsys.readouterr().err.split())
