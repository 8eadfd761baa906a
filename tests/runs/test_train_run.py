"""The whole road on a tiny model: every file of a run, and what is left when a run does not end well."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from phinetune.base.errors import DataError, DivergedError, ModelError, SettingsError, SpaceError, UserError
from phinetune.base.events import Compared, Evaluated, Finished, Planned, Saved, Stepped, Trained, read_events
from phinetune.base.files import manifest_fault
from phinetune.lora.files import load_adapter, read_metadata
from phinetune.models.loading import load_base
from phinetune.runs import road
from phinetune.runs.folder import RunFolder
from phinetune.runs.train_run import train_run
from phinetune.training import loop
from phinetune.training.validation import Validation

SUMMARY_KEYS = {
    "run_id", "status", "stopped_because", "base", "adapter", "data", "lineage", "steps", "best_step",
    "seconds", "comparison_seconds", "total_seconds", "tokens_per_second", "peak_memory_bytes", "forecast",
    "evaluation", "warnings",
}  # fmt: skip


def run_of(project, name="r"):
    return RunFolder(project / "runs" / name)


def status_of(project, name="r"):
    return json.loads(run_of(project, name).run_json.read_text())["status"]


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture
def project(new_project):
    return new_project()


def test_a_run_leaves_every_file_and_what_they_say_agrees(project, models):
    events = list(train_run(project, run_name="r"))
    run = run_of(project)
    names = {path.name for path in run.path.iterdir()}
    assert names == {
        "adapter", "checkpoints", "events.jsonl", "plots", "report.html", "run.json", "summary.json",
        "trainer_state.json",
    }  # fmt: skip
    assert (run.path / "plots" / "loss.svg").read_text().lstrip().startswith("<")
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-000003", "step-000004", "best"}
    for folder in (run.adapter, *run.checkpoints.iterdir()):
        assert manifest_fault(folder) == ""
    assert not list(run.path.rglob(".tmp-*"))

    summary = json.loads(run.summary.read_text())
    assert summary == events[-1].summary
    assert isinstance(events[-1], Finished)
    assert summary.keys() == SUMMARY_KEYS
    assert summary["base"].keys() == {"name", "sha256", "dtype", "quantize", "parameters"}
    assert summary["adapter"].keys() == {"path", "parameters", "rank", "target_modules"}
    assert summary["data"]["train"].keys() == {"path", "sha256", "examples", "tokens", "trained_tokens"}
    assert summary["forecast"].keys() == {
        "seconds", "comparison_seconds", "total_seconds", "peak_memory_bytes",
    }  # fmt: skip
    assert summary["evaluation"].keys() == {"base", "adapter", "difference"}
    assert summary["evaluation"]["difference"]["loss"].keys() == {"value", "low", "high"}
    assert (summary["status"], summary["steps"], summary["run_id"]) == ("succeeded", 4, "r")
    assert summary["adapter"]["parameters"] == sum(
        tensor.numel() for tensor in load_file(run.adapter / "adapter_model.safetensors").values()
    )
    assert status_of(project) == "succeeded"

    # The proof and the loop measured the same adapter and the same base.
    evaluated = {event.step: event for event in of(Evaluated, events)}
    best = evaluated[summary["best_step"]]
    assert best.loss == min(event.loss for step, event in evaluated.items() if step)
    assert summary["evaluation"]["base"]["loss"] == pytest.approx(evaluated[0].loss, rel=1e-5)
    assert summary["evaluation"]["adapter"]["loss"] == pytest.approx(best.loss, rel=1e-5)
    assert best.loss < evaluated[0].loss

    kept = list(read_events(run.events))
    assert [event["event"] for event in kept] == [
        type(event).__name__ for event in events[events.index(of(Planned, events)[0]) :]
    ]
    (planned,) = of(Planned, events)
    assert planned.plan["num_steps"] == 4 == len(of(Stepped, events))
    targets = {row["target"] for row in planned.plan["coverage"]}
    assert targets == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert [event.step for event in of(Saved, events)] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_on_disk_gives_the_compared_answers(project, models):
    events = list(train_run(project, run_name="r"))
    (compared,) = of(Compared, events)
    adapter = run_of(project).adapter
    base = load_base(str(models[0]), device_name="cpu", dtype="float32")
    load_adapter(base.model, adapter, base_sha256=base.sha256)
    header = read_metadata(adapter)
    (trained,) = of(Trained, events)
    assert (header["step"], header["run_id"]) == (str(trained.best_step), "r")
    assert header["base_sha256"] == base.sha256
    assert len(compared.answers) == 2

    ids = torch.arange(20)[None] + 100
    plain = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, adapter).eval()
    with torch.no_grad(), base.plain_attention():
        ours = base.model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(ours, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_bytes(project):
    for name in ("a", "b"):
        list(train_run(project, run_name=name, overrides={"lora_dropout": "0.2"}))
    list(train_run(project, run_name="c", overrides={"lora_dropout": "0.2", "seed": "43"}))
    a, b, c = (load_file(run_of(project, n).adapter / "adapter_model.safetensors") for n in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a)


def test_saving_the_best_does_not_turn_training_back(project, monkeypatch):
    list(train_run(project, run_name="better"))
    losses = iter([9.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(
        loop,
        "validate",
        lambda *args: Validation(loss=next(losses), token_accuracy=0.0, num_trained_tokens=1),
    )
    events = list(train_run(project, run_name="worse"))
    assert of(Trained, events)[0].best_step == 1

    def weights(folder):
        return load_file(folder / "adapter_model.safetensors")

    better, worse = run_of(project, "better"), run_of(project, "worse")
    same, other = weights(worse.checkpoint(4)), weights(worse.best)
    assert all(torch.equal(tensor, same[key]) for key, tensor in weights(better.checkpoint(4)).items())
    assert not any(torch.equal(tensor, same[key]) for key, tensor in other.items())
    assert all(torch.equal(tensor, other[key]) for key, tensor in weights(worse.adapter).items())
    assert read_metadata(worse.best)["step"] == read_metadata(worse.adapter)["step"] == "1"


def test_another_base_refuses_the_adapter(project, models):
    list(train_run(project, run_name="r"))
    base = load_base(str(models[1]), device_name="cpu", dtype="float32")
    with pytest.raises(UserError, match="another base model"):
        load_adapter(base.model, run_of(project).adapter, base_sha256=base.sha256)


def spoil_line(project):
    path = project / "dataset" / "train.json"
    path.write_text(path.read_text() + '{"messages": [}\n')


def spoil_yaml(project):
    path = project / "lora" / "lora.yaml"
    path.write_text(path.read_text().replace("epochs:", "epoch:"))


WRONG = {
    "data": (spoil_line, {}, DataError, "1 fault"),
    "no test set": (lambda p: (p / "dataset" / "test.json").unlink(), {}, UserError, "no test set"),
    "no data": (lambda p: shutil.rmtree(p / "dataset"), {}, DataError, "no data set"),
    "settings": (spoil_yaml, {}, SettingsError, "unknown setting 'epoch'"),
    "override": (None, {"epochs": "many"}, SettingsError, "'epochs' cannot be"),
    "model": (None, {"model": "./nowhere"}, ModelError, "no model folder"),
    "target": (None, {"lora_target_modules": "[q_proj]"}, SettingsError, "matches no linear layer"),
    "too long": (None, {"finetune_train_seqlen": "8"}, DataError, "longer than 8 tokens"),
    "all dropped": (
        None,
        {"finetune_train_seqlen": "8", "overlong": "drop"},
        DataError,
        "no example is left",
    ),
    "context": (None, {"finetune_test_seqlen": "300"}, SettingsError, "longer than the model's context"),
    "no project": (lambda p: shutil.rmtree(p / "lora"), {}, SettingsError, "no lora.yaml"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_input_is_refused_before_there_is_a_run_folder(project, fault):
    damage, overrides, error, match = WRONG[fault]
    if damage:
        damage(project)
    with pytest.raises(error, match=match):
        list(train_run(project, run_name="r", overrides=overrides))
    assert not (project / "runs").exists()


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "x" * 65, "a b"])
def test_a_bad_name_of_a_run_is_refused(project, name):
    with pytest.raises(UserError, match="cannot be the name"):
        next(train_run(project, run_name=name))


def test_a_taken_name_is_refused_and_the_run_left_alone(project):
    (project / "runs" / "r").mkdir(parents=True)
    with pytest.raises(UserError, match="already"):
        next(train_run(project, run_name="r"))
    assert list((project / "runs" / "r").iterdir()) == []


def test_too_little_disk_is_refused_beforehand(project, monkeypatch):
    usage = shutil.disk_usage(project)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SpaceError, match="the run's checkpoints"):
        list(train_run(project, run_name="r"))
    assert not (project / "runs").exists()


def until(run, kind, number=1):
    for event in run:
        number -= isinstance(event, kind)
        if number == 0:
            return event
    raise AssertionError(kind)


def test_closing_after_the_plan_leaves_nothing(project):
    run = train_run(project, run_name="r")
    until(run, Planned)
    run.close()
    assert not (project / "runs").exists()


def test_a_caller_that_stops_listening_at_the_end_leaves_a_finished_run(project):
    run = train_run(project, run_name="r")
    until(run, Finished)
    assert status_of(project) == "succeeded"
    run.close()
    assert status_of(project) == "succeeded"


def test_closing_in_the_middle_keeps_the_checkpoint(project):
    run = train_run(project, run_name="r")
    until(run, Saved, 2)
    run.close()
    assert status_of(project) == "interrupted"
    folder = run_of(project)
    assert manifest_fault(folder.checkpoint(2)) == ""
    assert manifest_fault(folder.best) == ""
    assert not folder.adapter.exists()
    assert not folder.summary.exists()
    assert [e["event"] for e in read_events(folder.events)][-1] == "Saved"


def test_an_interrupt_inside_a_step_marks_the_run(project, monkeypatch):
    original = loop.train_step

    def interrupt(*args, **kwargs):
        if kwargs["step"] == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(train_run(project, run_name="r"))
    assert status_of(project) == "interrupted"
    assert manifest_fault(run_of(project).checkpoint(2)) == ""


def test_a_diverged_run_says_so_and_keeps_what_was_good(project, monkeypatch):
    original = loop.train_step

    def diverge(base, adapter, *args, **kwargs):
        if kwargs["step"] == 3:
            adapter.parameters()[0].register_hook(lambda gradient: gradient * float("nan"))
        return original(base, adapter, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", diverge)
    with pytest.raises(DivergedError, match="diverged"):
        list(train_run(project, run_name="r"))
    assert status_of(project) == "diverged"
    weights = load_file(run_of(project).checkpoint(2) / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_run_that_fails_in_another_way_says_failed(project, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(road, "prove", fail)
    with pytest.raises(MemoryError):
        list(train_run(project, run_name="r"))
    assert status_of(project) == "failed"
    assert manifest_fault(run_of(project).adapter) == ""


def test_run_json_tells_what_a_result_depends_on(project, models):
    list(train_run(project, run_name="r", overrides={"seed": "7"}))
    record = json.loads(run_of(project).run_json.read_text())
    assert record["settings"]["seed"] == 7
    assert len(record["base"]["sha256"]) == 64
    assert len(record["data"]["train"]["sha256"]) == 64
    assert record["data"]["train"]["examples"] == 8
    assert {"phinetune", "torch", "transformers"} <= record["machine"]["versions"].keys()
    assert record["started"] <= record["ended"]
