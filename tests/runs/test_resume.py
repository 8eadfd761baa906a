"""A run that was cut off goes on in the same folder and ends as if it had never been."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from phinetune.base.errors import DivergedError, UserError
from phinetune.base.events import (
    Evaluated,
    Finished,
    Noted,
    Paused,
    Planned,
    Resumed,
    Saved,
    Stage,
    Stepped,
    Stopped,
    Warned,
)
from phinetune.base.files import manifest_fault
from phinetune.lora import tensor_file
from phinetune.reports.history import read_history
from phinetune.runs import road, saving
from phinetune.runs.folder import RunFolder
from phinetune.runs.stopping import StopRequest
from phinetune.runs.train_run import train_run
from phinetune.training import loop
from phinetune.training import step as step_module

# Two epochs of four steps, each of two sequences in pieces of one; a checkpoint every second step.
CHANGES = {
    "num_training_steps": 8, "varied_seqlen": True, "gradient_accumulation_steps": 2, "lora_dropout": 0.2,
    "save_steps": 2, "compare_nsamples": 0, "early_stopping_patience": 9,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _without_the_pictures(monkeypatch):
    """The proof is tested elsewhere; here it would be most of the time."""
    monkeypatch.setattr("phinetune.runs.proof.report_html", lambda path: None)
    monkeypatch.setattr("phinetune.runs.proof.loss_plot", lambda events, path: None)
    monkeypatch.setattr("phinetune.training.forecast._seconds_per_token", lambda *args: (1e-4, 1e-4))


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def run_of(project, name="r"):
    return RunFolder(project / "runs" / name)


def outcome(run):
    """What must be equal bit for bit: adapter, optimizer, best weights, and the course of the loss."""
    kept = {}
    for path in (run.adapter, run.best, run.checkpoint(8)):
        for file in sorted(path.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                kept[f"{path.name}/{file.name}/{name}"] = tensor
    history = read_history(run.events)
    course = [(step.step, step.loss, step.grad_norm, step.learning_rate) for step in history.steps]
    return kept, course, [(entry.step, entry.loss) for entry in history.evaluations]


def assert_same(one, two):
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])
    assert any("optimizer" in name for name in one[0])
    assert one[1:] == two[1:]
    assert len(one[1]) == 8


def until(run, kind, number=1):
    for event in run:
        number -= isinstance(event, kind)
        if number == 0:
            return event
    raise AssertionError(kind)


def cut(project, kind=Stepped, number=5, name="r", **kwargs):
    run = train_run(project, run_name=name, **kwargs)
    until(run, kind, number)
    run.close()
    return run_of(project, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_cut_anywhere_ends_in_the_same_bits(new_project, dtype):
    project = new_project(**{**CHANGES, "dtype": dtype})
    list(train_run(project, run_name="whole"))
    whole = outcome(run_of(project, "whole"))
    places = [(Evaluated, 1), (Stepped, 1), (Stepped, 5), (Evaluated, 5), (Saved, 2), (Saved, 4)]
    for number, place in enumerate(places):
        run = cut(project, *place, name=f"cut-{number}")
        assert run.status() == "interrupted"
        events = list(train_run(project, run_name=run.run_id, resume=True))
        assert isinstance(events[-1], Finished)
        assert_same(outcome(run), whole)
        assert run.status() == "succeeded"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_cut_run_on_a_quantised_base_ends_in_the_same_bits(new_project, kind):
    project = new_project(**CHANGES, quantize=kind)
    list(train_run(project, run_name="whole"))
    run = cut(project, number=5, name="cut")
    list(train_run(project, run_name="cut", resume=True))
    assert_same(outcome(run), outcome(run_of(project, "whole")))


def test_a_run_cut_twice_and_inside_a_step_ends_in_the_same_bits(new_project, monkeypatch):
    project = new_project(**CHANGES)
    list(train_run(project, run_name="whole"))
    original, calls = step_module.trained_token_loss, []

    def interrupt_in_the_second_piece(base, batch, *options):
        calls.append(1)
        if len(calls) in (8, 12):  # the second piece of a step
            raise KeyboardInterrupt
        return original(base, batch, *options)

    monkeypatch.setattr(step_module, "trained_token_loss", interrupt_in_the_second_piece)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            list(train_run(project, run_name="r", resume=resume))
    list(train_run(project, resume=True))
    assert_same(outcome(run_of(project)), outcome(run_of(project, "whole")))


def test_resuming_says_from_where_and_appends_to_the_same_log(new_project):
    project = new_project(**CHANGES)
    run = cut(project)
    before = run.events.read_bytes()
    events = list(train_run(project, resume=True))
    assert run.events.read_bytes().startswith(before)
    (resumed,) = of(Resumed, events)
    assert (resumed.step, resumed.path) == (4, str(run.checkpoint(4)))
    assert [event.step for event in of(Stepped, events)] == [5, 6, 7, 8]
    assert [path.name for path in project.glob("runs/*")] == ["r"]
    state = json.loads(run.trainer_state.read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, 9))


def test_the_newest_interrupted_run_is_chosen(new_project):
    project = new_project(**CHANGES)
    cut(project, name="old")
    cut(project, name="new")
    list(train_run(project, run_name="done", overrides={"num_training_steps": "2"}))
    events = train_run(project, resume=True)
    until(events, Resumed)
    assert run_of(project, "new").status() == "running"
    with pytest.raises(UserError, match="still running"):
        next(train_run(project, run_name="new", resume=True))
    events.close()
    until(train_run(project, run_name="old", resume=True), Resumed)


def test_a_finished_run_says_so_and_gives_its_summary(new_project):
    project = new_project(num_training_steps=1, compare_nsamples=0)
    list(train_run(project, run_name="r"))
    before = {path: path.stat().st_mtime_ns for path in run_of(project).path.rglob("*")}
    note, finished = train_run(project, resume=True)
    assert "'r' is finished" in note.what
    assert finished.summary["run_id"] == "r"
    assert before == {path: path.stat().st_mtime_ns for path in run_of(project).path.rglob("*")}


def test_where_there_is_no_run_it_is_said(new_project):
    project = new_project(**CHANGES)
    with pytest.raises(UserError, match="no run to resume"):
        next(train_run(project, resume=True))
    with pytest.raises(UserError, match="no run 'x' to resume"):
        next(train_run(project, run_name="x", resume=True))


def test_a_new_run_tells_of_the_interrupted_one_and_leaves_it_alone(new_project):
    project = new_project(**CHANGES)
    run = cut(project, Saved, 1)
    before = run.events.read_bytes()
    events = train_run(project, run_name="new")
    note = until(events, Noted)
    assert "'r' ended early at step-000002" in note.what
    assert f"phinetune train {project} --resume" in note.what
    until(events, Planned)
    events.close()
    assert run.events.read_bytes() == before


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CHANGED = {
    "lora.yaml": (
        lambda p: edit(p / "lora" / "lora.yaml", "learning_rate: 0.01", "learning_rate: 0.02"),
        {},
        "learning_rate was 0.01, now 0.02",
    ),
    "--set": (lambda p: None, {"seed": "3"}, "seed was 42, now 3"),
    "data": (
        lambda p: edit(p / "dataset" / "train.json", "red", "rod"),
        {},
        "the train data has changed",
    ),
    "test data": (lambda p: edit(p / "dataset" / "test.json", "red", "rod"), {}, "the test data has changed"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_has_changed_is_named_and_refused(new_project, change):
    project = new_project(**CHANGES)
    run = cut(project)
    before = run.run_json.read_bytes()
    damage, overrides, message = CHANGED[change]
    damage(project)
    with pytest.raises(UserError, match="something has changed") as caught:
        list(train_run(project, resume=True, overrides=overrides))
    assert message in caught.value.why
    assert run.run_json.read_bytes() == before


def test_another_base_is_refused(new_project, models, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(models[0], base)
    project = new_project(**{**CHANGES, "model": str(base)})
    cut(project)
    shutil.copy(models[1] / "model.safetensors", base / "model.safetensors")
    with pytest.raises(UserError, match="something has changed") as caught:
        list(train_run(project, resume=True))
    assert "the weights of the base have changed" in caught.value.why


def test_the_overrides_of_the_run_are_kept(new_project):
    project = new_project(**CHANGES)
    run = cut(project, overrides={"seed": "7"})
    events = list(train_run(project, resume=True))
    assert isinstance(events[-1], Finished)
    assert run.record()["settings"]["seed"] == 7


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(new_project):
    project = new_project(**CHANGES)
    list(train_run(project, run_name="whole"))
    run = cut(project)
    with (run.checkpoint(4) / "optimizer.safetensors").open("r+b") as file:
        file.truncate(10)
    (run.checkpoints / ".tmp-step-000006-dead").mkdir()
    (run.checkpoints / ".trash-step-000001-dead").mkdir()
    events = list(train_run(project, resume=True))
    assert any("step-000004 is skipped: optimizer" in event.what for event in of(Warned, events))
    assert of(Resumed, events)[0].step == 2
    assert_same(outcome(run), outcome(run_of(project, "whole")))
    assert not list(run.path.rglob(".t*"))


def spoil_all(run):
    for path in run.checkpoints.glob("step-*"):
        (path / "state.json").unlink()


def remove_all(run):
    for path in run.checkpoints.glob("step-*"):
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("damage", "match"), [(spoil_all, "no checkpoint of the run can be used"), (remove_all, "none is there")]
)
def test_there_is_never_a_silent_start_from_zero(new_project, damage, match):
    project = new_project(**CHANGES)
    run = cut(project)
    damage(run)
    with pytest.raises(UserError, match=match):
        list(train_run(project, resume=True))
    assert not run.adapter.exists()


def test_a_run_cut_before_its_first_checkpoint_begins_anew_and_says_so(new_project):
    project = new_project(**CHANGES)
    cut(project, Stepped, 1)
    events = list(train_run(project, resume=True))
    assert any("before its first checkpoint" in event.what for event in of(Noted, events))
    assert [event.step for event in of(Stepped, events)] == list(range(1, 9))


def test_a_run_cut_in_the_comparison_repeats_no_step(new_project, monkeypatch):
    project = new_project(**CHANGES)

    def fail(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(road, "prove", fail)
        with pytest.raises(MemoryError):
            list(train_run(project, run_name="r"))
    before = load_file(run_of(project).adapter / "adapter_model.safetensors")
    events = list(train_run(project, resume=True))
    assert of(Stepped, events) == []
    after = load_file(run_of(project).adapter / "adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("kind", "number"), [(Stepped, 3), (Stepped, 4), (Evaluated, 1), (Evaluated, 4)])
def test_a_run_asked_to_stop_saves_where_it_is(new_project, kind, number):
    project = new_project(**CHANGES)
    list(train_run(project, run_name="whole"))
    stop, events = StopRequest(), []
    for event in train_run(project, run_name="r", stop=stop):
        events.append(event)
        if isinstance(event, kind):
            number -= 1
        if number == 0:
            assert stop.is_heard
            stop.is_wanted = True
            number = -1
    assert isinstance(events[-1], Stopped)
    run = run_of(project)
    step = of(Stepped, events)[-1].step if of(Stepped, events) else 0
    assert events[-1].path == str(run.checkpoint(step))
    assert manifest_fault(run.checkpoint(step)) == ""
    assert run.status() == "interrupted"
    assert not run.adapter.exists()
    rest = list(train_run(project, resume=True))
    assert of(Resumed, rest)[0].step == step
    assert_same(outcome(run), outcome(run_of(project, "whole")))


def full_disk(monkeypatch, *, num_failures, step="step-000004"):
    """Writing checkpoints fails until it has failed so often; what was waited is counted."""
    original, failed, waited = tensor_file.save_file, [], []

    def save_file(content, path, metadata=None):
        if f".tmp-{step}" in str(path) and len(failed) < num_failures:
            failed.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        original(content, path, metadata)

    monkeypatch.setattr(tensor_file, "save_file", save_file)
    monkeypatch.setattr(saving.time, "sleep", waited.append)
    return waited


def test_a_full_disk_costs_old_checkpoints_then_time_and_nothing_else(new_project, monkeypatch):
    project = new_project(**{**CHANGES, "save_steps": 1})
    list(train_run(project, run_name="whole"))
    waited = full_disk(monkeypatch, num_failures=4)
    events = []
    for event in train_run(project, run_name="r"):
        events.append(event)
        if isinstance(event, Paused):
            names = {path.name for path in run_of(project).checkpoints.iterdir()}
            assert names == {"step-000003", "best"}, "the older checkpoint and the half-written one are gone"
    (paused,) = of(Paused, events)
    assert paused.needed_bytes > 10_000
    assert paused.free_bytes > 0
    assert waited == [saving.RETRY_S] * 3
    assert_same(outcome(run_of(project)), outcome(run_of(project, "whole")))


def test_a_run_that_waits_for_room_can_be_stopped(new_project, monkeypatch):
    project = new_project(**CHANGES)
    full_disk(monkeypatch, num_failures=10**9)
    stop, events = StopRequest(), []
    for event in train_run(project, run_name="r", stop=stop):
        events.append(event)
        stop.is_wanted = isinstance(event, Paused) or stop.is_wanted
    assert isinstance(events[-1], Stopped)
    run = run_of(project)
    assert events[-1].path == str(run.checkpoint(2))
    assert run.status() == "interrupted"
    assert manifest_fault(run.checkpoint(2)) == ""


def diverge_at(monkeypatch, step, times):
    original, done = loop.train_step, []

    def diverge(base, adapter, *args, **kwargs):
        if kwargs["step"] == step and len(done) < times:
            done.append(step)
            raise DivergedError("the run diverged", where=f"step {step}")
        return original(base, adapter, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", diverge)


@pytest.mark.parametrize(("step", "back_to"), [(6, 4), (1, 0)])
def test_a_diverged_run_may_try_once_more_at_half_the_rate(new_project, monkeypatch, step, back_to):
    project = new_project(**CHANGES, retry_on_divergence=True)
    diverge_at(monkeypatch, step, 1)
    events = list(train_run(project, run_name="r"))
    assert isinstance(events[-1], Finished)
    assert any(f"back to step {back_to}" in event.what for event in of(Warned, events))
    steps = of(Stepped, events)
    first = [event for event in steps if event.step > back_to][-(8 - back_to) :]
    assert [event.step for event in first] == list(range(back_to + 1, 9))
    assert first[0].learning_rate == pytest.approx(0.5 * 1e-2 * (1 - back_to / 8))


@pytest.mark.parametrize(("is_retried", "times"), [(False, 1), (True, 2)])
def test_a_run_that_diverges_for_good_is_not_resumed(new_project, monkeypatch, is_retried, times):
    project = new_project(**CHANGES, retry_on_divergence=is_retried)
    diverge_at(monkeypatch, 6, times)
    with pytest.raises(DivergedError):
        list(train_run(project, run_name="r"))
    assert run_of(project).status() == "diverged"
    with pytest.raises(UserError, match="diverged"):
        list(train_run(project, resume=True))


def test_half_the_rate_survives_an_interruption(new_project, monkeypatch):
    project = new_project(**CHANGES, retry_on_divergence=True)
    diverge_at(monkeypatch, 4, 1)
    run = train_run(project, run_name="r")
    until(run, Warned)
    until(run, Saved, 2)
    run.close()
    events = list(train_run(project, resume=True))
    assert of(Resumed, events)[0].step == 6
    assert of(Stepped, events)[0].learning_rate == pytest.approx(0.5 * 1e-2 * (1 - 6 / 8))
    assert of(Stage, events)
