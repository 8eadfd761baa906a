"""Other tools are told every number of a run at its step; none of them can end it, and none is told unasked.

TensorBoard is the real one. The others are stand-ins with the calls of wandb 0.2x, mlflow 3 and trackio.
"""

from __future__ import annotations

import importlib.machinery
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from phinetune.base.errors import SettingsError
from phinetune.base.events import (
    Compared,
    Evaluated,
    Finished,
    Resumed,
    Stepped,
    Stopped,
    Warned,
    read_events,
)
from phinetune.runs.sinks.reporting import Reporter, require_installed
from phinetune.runs.train_run import train_run


def stepped(step, **changes):
    values = {
        "step": step, "num_steps": 6, "epoch": step / 6, "loss": 3.0 - step / 10, "learning_rate": 1e-3,
        "grad_norm": 1.0, "num_tokens": 100, "num_trained_tokens": 50, "seconds": 0.5,
    }  # fmt: skip
    return Stepped(**{**values, **changes})


def evaluated(step):
    return Evaluated(
        step=step, epoch=0.0, loss=2.0, token_accuracy=0.25, num_trained_tokens=9, is_best=True, seconds=1.0
    )


COMPARED = Compared(
    evaluation={"base": {"loss": 3.0, "f1": None}, "adapter": {"loss": 2.0, "f1": 0.5}},
    answers=[],
    seconds=1.0,
)
SETTINGS = {"learning_rate": 1e-3, "report_to": ["wandb"]}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "shop" / "runs" / "r1"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the three libraries; what was called on them, in order."""
    found = []
    for variable in ("WANDB_MODE", "TRACKIO_SPACE_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(variable, "unset by the test")

    def module(name, **members):
        made = ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    def log(values, step):
        found.append(("log", step, values))

    def wandb_init(**options):
        print("wandb: hello")
        found.append(("init", options))
        return SimpleNamespace(log=log, finish=lambda exit_code: found.append(("finish", exit_code)))

    def trackio_init(**options):
        print("trackio: hello")
        found.append(("init", options))
        return SimpleNamespace(log=log)

    module("wandb", init=wandb_init, Settings=dict)
    module("trackio", init=trackio_init, finish=lambda: found.append(("finish",)))
    module("mlflow", MlflowClient=lambda tracking_uri: FakeMlflow(found, tracking_uri))
    module("mlflow.entities", Metric=lambda *values: values)
    return found


class FakeMlflow:
    """The methods of MlflowClient that are used."""

    runs: dict[str, SimpleNamespace] = {}  # noqa: RUF012  shared on purpose: the database outlives a client

    def __init__(self, calls, uri):
        self.calls = calls
        calls.append(("client", uri))

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="7") if self.runs else None

    def create_experiment(self, name, artifact_location):
        self.calls.append(("experiment", name, artifact_location))
        return "7"

    def create_run(self, experiment_id, tags, run_name):
        made = SimpleNamespace(info=SimpleNamespace(run_id=f"id-{len(self.runs)}"))
        self.runs[tags["phinetune_run"]] = made
        return made

    def search_runs(self, experiment_ids, filter_string, max_results):
        name = filter_string.split("'")[1]
        return [self.runs[name]] if name in self.runs else []

    def update_run(self, run_id, status):
        self.calls.append(("update", run_id, status))

    def log_param(self, run_id, name, value):
        self.calls.append(("param", name, value))

    def log_batch(self, run_id, metrics):
        step = metrics[0][3]
        self.calls.append(("log", step, {name: value for name, value, _, _ in metrics}))

    def set_terminated(self, run_id, status):
        self.calls.append(("finish", run_id, status))


@pytest.fixture(autouse=True)
def _empty_database():
    FakeMlflow.runs = {}


def told(names, run, events):
    return list(Reporter(names, run, SETTINGS).reported(iter(events)))


def logged(calls):
    return [call[1:] for call in calls if call[0] == "log"]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_every_number_is_told_at_its_step_and_the_events_pass_unchanged(name, run, calls, capsys):
    events = [
        evaluated(0),
        stepped(1),
        stepped(2, grad_norm=math.nan),
        evaluated(2),
        COMPARED,
        Finished(summary={}),
    ]
    assert told([name], run, events) == events
    assert logged(calls) == [
        (0, {"eval/loss": 2.0, "eval/token_accuracy": 0.25}),
        (
            1,
            {
                "train/loss": 2.9,
                "train/learning_rate": 1e-3,
                "train/grad_norm": 1.0,
                "train/epoch": 1 / 6,
                "train/tokens_per_second": 200.0,
            },
        ),
        (
            2,
            {
                "train/loss": 2.8,
                "train/learning_rate": 1e-3,
                "train/epoch": 2 / 6,
                "train/tokens_per_second": 200.0,
            },
        ),
        (2, {"eval/loss": 2.0, "eval/token_accuracy": 0.25}),
        (2, {"compare/loss/base": 3.0, "compare/loss/adapter": 2.0, "compare/f1/adapter": 0.5}),
    ]
    assert (
        calls[-1]
        == {"wandb": ("finish", 0), "mlflow": ("finish", "id-0", "FINISHED"), "trackio": ("finish",)}[name]
    )
    assert capsys.readouterr().out == ""  # standard output is for results


def test_nothing_leaves_the_machine_unless_the_user_asked(run, calls, monkeypatch):
    told(["wandb", "trackio", "mlflow"], run, [stepped(1), Finished(summary={})])
    wandb, trackio = (call[1] for call in calls if call[0] == "init")
    assert (wandb["mode"], wandb["dir"], wandb["project"]) == ("offline", str(run), "shop")
    assert trackio["space_id"] is None
    (client,) = (call for call in calls if call[0] == "client")
    assert client[1] == f"sqlite:///{(run.parents[1] / 'mlflow.db').as_posix()}"
    calls.clear()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    told(["wandb", "trackio", "mlflow"], run, [stepped(1), Finished(summary={})])
    wandb, trackio = (call[1] for call in calls if call[0] == "init")
    assert (wandb["mode"], trackio["space_id"]) == ("online", "me/runs")
    assert ("client", "http://127.0.0.1:5000") in calls


@pytest.mark.parametrize(
    "variable", ["WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED"]
)
def test_the_tools_own_telemetry_is_off(variable, run, calls, monkeypatch):
    import os

    monkeypatch.delenv(variable)
    told(["wandb", "trackio", "mlflow"], run, [stepped(1)])
    assert os.environ[variable].lower() == ("true" if variable.startswith("MLFLOW") else "false")


def test_a_resumed_run_goes_on_in_the_same_place(run, calls):
    told(["wandb", "mlflow", "trackio"], run, [stepped(1), Stopped(step=1, path="")])
    assert {call for call in calls if call[0] == "finish"} == {
        ("finish", 1), ("finish",), ("finish", "id-0", "KILLED"),
    }  # fmt: skip
    calls.clear()
    told(["wandb", "mlflow", "trackio"], run, [Resumed(step=1, path=""), stepped(2), Finished(summary={})])
    for options in (call[1] for call in calls if call[0] == "init"):
        assert (options["name"], options["resume"]) == ("r1", "allow")
    assert ("update", "id-0", "RUNNING") in calls
    assert len(FakeMlflow.runs) == 1


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tool_that_fails_is_left_out_with_a_warning_and_the_run_goes_on(call, run, calls, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("no such project\nand more")

    trackio = sys.modules["trackio"]
    if call == "log":
        monkeypatch.setattr(trackio, "init", lambda **options: SimpleNamespace(log=fail))
    else:
        monkeypatch.setattr(trackio, call, fail)
    events = [stepped(1), stepped(2), Finished(summary={})]
    passed = told(["trackio", "wandb"], run, events)
    (warned,) = [event for event in passed if isinstance(event, Warned)]
    assert "trackio fails" in warned.what
    assert "(ValueError: no such project)" in warned.what
    assert [event for event in passed if not isinstance(event, Warned)] == events
    assert isinstance(passed[-1], Finished)
    assert [step for step, _ in logged(calls)][-2:] == ([1, 2] if call != "finish" else [2, 2])


def test_a_run_that_ends_badly_is_closed_as_failed_or_interrupted(run, calls):
    def failing():
        yield stepped(1)
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        told(["mlflow"], run, failing())
    assert calls[-1] == ("finish", "id-0", "FAILED")
    events = Reporter(["wandb"], run, SETTINGS).reported(iter([stepped(1), stepped(2)]))
    next(events)
    events.close()
    assert calls[-1] == ("finish", 1)


def scalars(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_holds_every_step_once_also_after_a_resume(run):
    told(["tensorboard"], run, [evaluated(0), *map(stepped, (1, 2, 3)), Stopped(step=3, path="")])
    told(
        ["tensorboard"],
        run,
        [Resumed(step=2, path=""), *map(stepped, (3, 4)), COMPARED, Finished(summary={})],
    )
    found = scalars(run)
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]
    assert [value for _, value in found["train/loss"]] == pytest.approx([2.9, 2.8, 2.7, 2.6])
    assert found["eval/loss"] == [(0, 2.0)]
    assert found["compare/f1/adapter"] == [(4, 0.5)]


def test_a_whole_run_is_shown_as_its_own_log_has_it(new_project):
    project = new_project(report_to=("tensorboard",))
    list(train_run(project, run_name="r"))
    run = project / "runs" / "r"
    kept = list(read_events(run / "events.jsonl"))
    found = scalars(run)
    for tag, kind, key in (
        ("train/loss", "Stepped", "loss"),
        ("train/learning_rate", "Stepped", "learning_rate"),
        ("eval/loss", "Evaluated", "loss"),
    ):
        expected = [(event["step"], event[key]) for event in kept if event["event"] == kind]
        assert [step for step, _ in found[tag]] == [step for step, _ in expected]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.parametrize("names", [["wandb"], ["mlflow", "trackio"]])
def test_a_missing_tool_is_refused_before_anything_is_read_with_what_to_install(
    names, new_project, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError) as caught:
        require_installed(names)
    assert f"pip install {' '.join(names)}" in caught.value.do
    project = new_project(report_to=tuple(names))
    with pytest.raises(SettingsError, match="not installed"):
        next(train_run(project))
    assert not (project / "runs").exists()


def test_nobody_is_told_without_being_named(run, calls):
    told([], run, [stepped(1), Finished(summary={})])
    assert calls == []
    assert list(run.iterdir()) == []
