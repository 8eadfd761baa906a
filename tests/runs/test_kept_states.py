"""States below the first trained block are kept over epochs and runs; the plan says so, results stay."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_project import project_maker, write_model

from phinetune.base.events import Evaluated, Planned, Stage, Stopped
from phinetune.runs import kept_states
from phinetune.runs.resume import find_unfinished
from phinetune.runs.stopping import StopRequest
from phinetune.runs.train_run import train_run

TWO_EPOCHS = {
    "num_training_steps": None, "epochs": 2.0, "layers_to_transform": (1,), "varied_seqlen": True,
    "lora_dropout": 0.1, "eval_steps": 4, "save_steps": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "one", 0), write_model(folder / "two", 1)


@pytest.fixture
def make(models, tmp_path):
    return project_maker(models, tmp_path)


def ran(project: Path, **options: Any) -> tuple[dict[str, Any], list[float], dict[str, torch.Tensor], int]:
    """Plan, test losses, adapter and how often states were made or opened."""
    events = list(train_run(project, **options))
    (plan,) = (event.plan for event in events if isinstance(event, Planned))
    losses = [event.loss for event in events if isinstance(event, Evaluated)]
    runs = sorted((project / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    weights = load_file(runs[-1] / "adapter" / "adapter_model.safetensors")
    return plan, losses, weights, sum(isinstance(e, Stage) and e.name == "keep states" for e in events)


def test_they_change_nothing_but_the_work(make, monkeypatch):
    project = make(**TWO_EPOCHS)
    plan, losses, weights, num_kept = ran(project)
    assert plan["kept_states"]["first_block"] == 1
    assert plan["kept_states"]["is_made"] is False
    assert num_kept == 1
    (made,) = (project / "cache" / "states").iterdir()
    size = (made / "states.npy").stat().st_size
    assert 0 <= size - plan["kept_states"]["size_bytes"] < 200

    again = ran(project)
    assert again[0]["kept_states"]["is_made"] is True
    assert all(torch.equal(again[2][name], weights[name]) for name in weights)

    monkeypatch.setattr(kept_states, "first_trained_block", lambda base: 0)
    plain = ran(project)
    assert plain[0]["kept_states"] is None
    assert losses == pytest.approx(plain[1], rel=1e-5)
    assert max((weights[name] - plain[2][name]).abs().max() for name in weights) < 1e-4


@pytest.mark.parametrize("changes", [{"layers_to_transform": None}, {"epochs": 1.0}])
def test_nothing_is_kept_where_it_buys_nothing(make, changes):
    project = make(**{**TWO_EPOCHS, **changes})
    plan, *_, num_kept = ran(project)
    assert plan["kept_states"] is None
    assert num_kept == 0
    assert not (project / "cache" / "states").exists()


def test_nothing_is_kept_on_a_disk_with_little_room(make, monkeypatch):
    monkeypatch.setattr(kept_states, "LARGEST_SHARE", 1e-12)
    project = make(**TWO_EPOCHS)
    assert ran(project)[0]["kept_states"] is None
    assert not (project / "cache" / "states").exists()


def test_a_run_that_goes_on_without_the_file_ends_in_the_same_bits(make):
    whole = ran(make("whole", **TWO_EPOCHS))
    project = make("stopped", **TWO_EPOCHS)
    stop = StopRequest()
    for event in train_run(project, stop=stop):
        if isinstance(event, Evaluated) and event.step == 8:
            stop.is_wanted = True
        is_stopped = isinstance(event, Stopped)
    assert is_stopped
    shutil.rmtree(project / "cache")
    assert find_unfinished(project, None).record["kept_states"] is True
    resumed = ran(project, resume=True)
    assert resumed[0]["kept_states"]["is_made"] is False
    assert all(torch.equal(resumed[2][name], whole[2][name]) for name in whole[2])
