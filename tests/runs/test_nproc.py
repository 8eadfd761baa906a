"""A run in several processes is the run in one, and outlives the death of any of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from labelled_project import write_labelled_set

from phinetune.base.errors import LostProcessError, UserError
from phinetune.base.events import Event, Finished, Stepped, Stopped, Warned
from phinetune.lora.tensor_file import read_tensors
from phinetune.runs.folder import RunFolder
from phinetune.runs.processes import on_loopback
from phinetune.runs.stopping import StopRequest
from phinetune.runs.train_run import train_run

# As close as float32 sums in another order come after some steps of Adam. Its epsilon is raised, as it would
# blow up the last bits of gradients that are almost zero.
TOLERANCE = 1e-6
SETTINGS = {
    "num_training_steps": 6, "finetune_train_batch_size": 3, "varied_seqlen": True, "eval_steps": 2,
    "save_steps": 2, "adam_epsilon": 1e-5, "learning_rate": 1e-3, "early_stopping_patience": 9,
}  # fmt: skip


def run_of(project: Path, name: str) -> RunFolder:
    return RunFolder(project / "runs" / name)


def records(run: RunFolder, *kinds: str) -> list[dict[str, Any]]:
    found = map(json.loads, run.events.read_text("utf-8").splitlines())
    return [record for record in found if record["event"] in kinds]


def curve(run: RunFolder) -> list[float]:
    return [record["loss"] for record in records(run, "Stepped", "Evaluated")]


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return read_tensors(run.adapter / "adapter_model.safetensors")[0]


def assert_same(one: RunFolder, two: RunFolder) -> None:
    assert curve(one) == pytest.approx(curve(two), rel=TOLERANCE)
    first, second = weights(one), weights(two)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < TOLERANCE


def helpers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "phinetune.runs.helper" in child.cmdline()]


def killed_at(step: int, events: Iterator[Event]) -> None:
    """Follow a run; kill its last helper without warning at a step."""
    for event in events:
        if isinstance(event, Stepped) and event.step == step:
            helpers()[-1].kill()


def test_two_processes_train_what_one_trains(new_project: Callable[..., Path]) -> None:
    project = new_project(**SETTINGS)
    list(train_run(project, run_name="one"))
    threads = torch.get_num_threads()
    events = list(train_run(project, run_name="two", nproc=2))
    assert isinstance(events[-1], Finished)
    assert not helpers()
    assert torch.get_num_threads() == threads
    one, two = run_of(project, "one"), run_of(project, "two")
    assert_same(one, two)
    counts = [
        [(step["num_tokens"], step["num_trained_tokens"]) for step in records(run, "Stepped")]
        for run in (one, two)
    ]
    assert counts[0] == counts[1]
    assert two.record()["processes"] == 2


def test_a_killed_process_ends_the_run_cleanly_and_it_resumes_alone(new_project: Callable[..., Path]) -> None:
    project = new_project(**SETTINGS)
    with pytest.raises(LostProcessError, match="lost") as caught:
        killed_at(3, train_run(project, run_name="cut", nproc=2))
    assert "process 2 of 2" in caught.value.where
    assert "signal 9" in caught.value.why
    assert "--resume" in caught.value.do
    assert not helpers()
    run = run_of(project, "cut")
    assert run.status() == "failed"
    assert run.checkpoint(3).is_dir(), "what was trained before the loss is saved"
    events = list(train_run(project, run_name="cut", resume=True))
    assert any("processes 2 -> 1" in event.what for event in events if isinstance(event, Warned))
    assert [event.step for event in events if isinstance(event, Stepped)] == [4, 5, 6]
    list(train_run(project, run_name="whole"))
    assert_same(run, run_of(project, "whole"))


def test_a_base_cannot_be_divided_among_one_process(new_project: Callable[..., Path]) -> None:
    project = new_project()
    with pytest.raises(UserError, match="divided among one process"):
        list(train_run(project, shard=True))
    assert not (project / "runs").exists()


def test_a_launcher_and_nproc_together_are_refused(
    new_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="started twice"):
        list(train_run(new_project(), nproc=2))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"finetune_train_batch_size": 1}, {"evaluation_strategy": "epoch"}])
def test_it_is_the_same_with_fewer_sequences_than_processes(
    changes: dict[str, object], new_project: Callable[..., Path]
) -> None:
    """Three processes, one sequence a step, three test examples."""
    project = new_project(**{**SETTINGS, **changes})
    list(train_run(project, run_name="one"))
    list(train_run(project, run_name="three", nproc=3))
    assert_same(run_of(project, "one"), run_of(project, "three"))


@pytest.mark.slow
def test_dropout_masks_are_those_of_one_process_where_a_pass_holds_one_sequence(
    new_project: Callable[..., Path],
) -> None:
    changes = {"lora_dropout": 0.3, "finetune_train_batch_size": 1, "gradient_accumulation_steps": 4}
    project = new_project(**{**SETTINGS, **changes})
    list(train_run(project, run_name="one"))
    list(train_run(project, run_name="two", nproc=2))
    list(train_run(project, run_name="again", nproc=2))
    assert_same(run_of(project, "one"), run_of(project, "two"))
    assert curve(run_of(project, "two")) == curve(run_of(project, "again"))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 3), (1, 2)])
def test_a_stopped_run_resumes_with_another_number_of_processes(
    first: int, second: int, new_project: Callable[..., Path]
) -> None:
    project = new_project(**SETTINGS)
    stop = StopRequest()
    for event in train_run(project, run_name="cut", nproc=first, stop=stop):
        stop.is_wanted |= isinstance(event, Stepped) and event.step == 3
    assert isinstance(event, Stopped)
    list(train_run(project, run_name="cut", nproc=second, resume=True))
    list(train_run(project, run_name="whole"))
    assert_same(run_of(project, "cut"), run_of(project, "whole"))


@pytest.mark.slow
def test_a_helper_asked_to_end_stops_the_whole_run_after_a_step(new_project: Callable[..., Path]) -> None:
    project = new_project(**{**SETTINGS, "num_training_steps": 400})
    events = []
    for event in train_run(project, run_name="asked", nproc=2):
        events.append(event)
        if isinstance(event, Stepped) and event.step == 2:
            helpers()[0].terminate()
    assert isinstance(events[-1], Stopped)
    assert run_of(project, "asked").status() == "interrupted"
    assert run_of(project, "asked").checkpoint(events[-1].step).is_dir()


@pytest.mark.slow
def test_a_divided_base_trains_the_same(new_project: Callable[..., Path]) -> None:
    """Unequal numbers of passes too: two processes, one of them with two of three test sequences."""
    project = new_project(**{**SETTINGS, "finetune_test_batch_size": 1, "finetune_train_batch_size": 1})
    list(train_run(project, run_name="one"))
    events = list(train_run(project, run_name="two", nproc=2, shard=True))
    assert isinstance(events[-1], Finished)
    assert_same(run_of(project, "one"), run_of(project, "two"))
    summaries = [json.loads(run_of(project, name).summary.read_text()) for name in ("one", "two")]
    losses = [summary["evaluation"]["adapter"]["loss"] for summary in summaries]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("retries", [True, False])
def test_divergence_is_seen_by_all_and_the_retry_is_made_by_all(
    retries: bool, new_project: Callable[..., Path]
) -> None:
    from phinetune.base.errors import DivergedError

    wild = {
        "learning_rate": 1.0, "max_grad_norm": 1e30, "lora_alpha": 1e30, "num_training_steps": 300,
        "evaluation_strategy": "no", "retry_on_divergence": retries,
    }  # fmt: skip
    project = new_project(**{**SETTINGS, **wild})
    events: list[Event] = []
    with pytest.raises(DivergedError):
        events.extend(train_run(project, run_name="wild", nproc=2))
    retried = [event for event in events if isinstance(event, Warned) and "half the learning" in event.what]
    assert bool(retried) is retries
    assert run_of(project, "wild").status() == "diverged"
    assert not helpers()


@pytest.mark.slow
def test_no_helper_outlives_the_first_process(new_project: Callable[..., Path]) -> None:
    project = new_project(**{**SETTINGS, "num_training_steps": 100_000})
    first = subprocess.Popen(
        [sys.executable, "-m", "phinetune", "train", str(project), "--nproc", "2", "--run", "r", "--json"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stderr
    for line in first.stderr:
        if line.startswith("step 2"):
            break
    (helper,) = psutil.Process(first.pid).children()
    first.kill()
    first.wait()
    first.stderr.close()
    assert helper.wait(10) is None or not helper.is_running()
    assert run_of(project, "r").status() == "interrupted"


@pytest.mark.slow
def test_torchrun_trains_the_same_and_only_one_process_speaks(
    new_project: Callable[..., Path],
) -> None:
    project = new_project(**SETTINGS)
    list(train_run(project, run_name="one"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-addr", "127.0.0.1"]
    command = [*torchrun, "-m", "--", "phinetune", "train", str(project), "--json"]
    with on_loopback():
        environment = dict(os.environ)
    result = subprocess.run(
        [*command, "--run", "two"], capture_output=True, text=True, timeout=150, check=False,
        env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["run_id"] == "two"
    assert result.stderr.count("step 1/6") == 1
    assert_same(run_of(project, "one"), run_of(project, "two"))
    again = subprocess.run(
        [*command, "--run", "two", "--resume"], capture_output=True, text=True, timeout=150, check=False
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["run_id"] == "two"


@pytest.mark.slow
def test_going_on_from_an_adapter_with_another_optimizer_is_the_same(
    new_project: Callable[..., Path],
) -> None:
    """The adapter has another rank than lora.yaml: its shape reaches the other process."""
    changes = {"optimizer": "sgd", "label_smoothing": 0.1, "learning_rate": 0.1}
    project = new_project(**{**SETTINGS, **changes})
    list(train_run(project, run_name="begin", overrides={"lora_r": "2"}))
    begin = project / "runs" / "begin"
    list(train_run(project, run_name="one", from_adapter=begin))
    list(train_run(project, run_name="two", from_adapter=begin, nproc=2))
    assert_same(run_of(project, "one"), run_of(project, "two"))
    assert all(2 in weight.shape for weight in weights(run_of(project, "two")).values())


def test_a_classification_in_two_processes_is_that_of_one(new_project: Callable[..., Path]) -> None:
    project = new_project(**SETTINGS, task="classification", finetune_dataset="labelled")
    write_labelled_set(project / "labelled")
    for name, number in (("one", 1), ("two", 2)):
        assert isinstance(list(train_run(project, run_name=name, nproc=number))[-1], Finished)
    assert_same(run_of(project, "one"), run_of(project, "two"))
    assert "base_model.model.score.weight" in weights(run_of(project, "two"))
