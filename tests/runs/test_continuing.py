"""Training on from an adapter: with its weights and shape, its history kept, and never on another base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_project import write_chats
from transformers import AutoModelForCausalLM

from phinetune.base.errors import AdapterError, IncompatibleLowRankAdapter, SettingsError
from phinetune.base.events import Evaluated, Finished, Noted, Planned, Resumed, Stepped, Trained, Warned
from phinetune.base.files import manifest_fault, sha256_file
from phinetune.cli import main
from phinetune.lora.files import read_metadata
from phinetune.runs import continuing
from phinetune.runs.folder import RunFolder
from phinetune.runs.train_run import train_run
from phinetune.training import loop
from phinetune.training.validation import Validation

CHANGES = {"varied_seqlen": True, "num_training_steps": 4, "save_steps": 2, "compare_nsamples": 0}


@pytest.fixture(autouse=True)
def _without_the_pictures(monkeypatch):
    monkeypatch.setattr("phinetune.runs.proof.report_html", lambda path: None)
    monkeypatch.setattr("phinetune.runs.proof.loss_plot", lambda events, path: None)
    monkeypatch.setattr("phinetune.training.forecast._seconds_per_token", lambda *args: (1e-4, 1e-4))


@pytest.fixture
def project(new_project):
    """A project with one finished run, `first`."""
    folder = new_project(**CHANGES)
    list(train_run(folder, run_name="first"))
    return folder


def run_of(project, name):
    return RunFolder(project / "runs" / name)


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def weights_of(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def continued(project, name="second", place=None, **kwargs):
    place = place or run_of(project, "first").path
    return list(train_run(project, run_name=name, from_adapter=place, **kwargs))


@pytest.mark.parametrize("place", ["run", "adapter", "project"])
def test_it_begins_where_the_other_run_ended(project, place):
    first = run_of(project, "first")
    found = {"run": first.path, "adapter": first.adapter, "project": project}[place]
    events = continued(project, place=found)
    summary = json.loads(first.summary.read_text())
    assert of(Evaluated, events)[0].loss == pytest.approx(summary["evaluation"]["adapter"]["loss"], rel=1e-5)
    assert of(Planned, events)[0].plan["from_adapter"] == str(first.adapter.resolve())
    assert of(Trained, events)[0].num_steps == 4
    before, after = weights_of(first), weights_of(run_of(project, "second"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_history_is_kept_in_the_record_the_summary_and_the_weights(project, capsys):
    continued(project)
    events = continued(project, "third", run_of(project, "second").adapter)
    run = run_of(project, "third")
    lineage = run.record()["lineage"]
    assert [entry["run_id"] for entry in lineage] == ["first", "second"]
    for entry in lineage:
        assert entry["sha256"] == sha256_file(
            run_of(project, entry["run_id"]).adapter / "adapter_model.safetensors"
        )
        assert entry["train_sha256"] == run.record()["data"]["train"]["sha256"]
        assert entry["path"].endswith(f"runs/{entry['run_id']}/adapter")
        assert int(entry["step"]) > 0
    assert isinstance(events[-1], Finished)
    assert events[-1].summary["lineage"] == lineage
    for folder in (run.adapter, run.best):
        assert json.loads(read_metadata(folder)["lineage"]) == lineage
    assert run_of(project, "first").record()["lineage"] == []
    assert "lineage" not in read_metadata(run_of(project, "first").adapter)
    assert any("had 1 before it" in event.what for event in of(Noted, events))
    assert main.run(["adapter", "show", str(run.adapter)]) == 0
    assert capsys.readouterr().out.count("before   run ") == 2


def test_more_data_may_be_added(project, tmp_path):
    write_chats(project / "dataset" / "train.json", ["new words", "others", "more", "again"])
    continued(project)
    second = run_of(project, "second").record()
    assert second["lineage"][0]["train_sha256"] != second["data"]["train"]["sha256"]


def test_a_cut_run_goes_on_in_the_same_bits_even_when_the_first_adapter_is_gone(project):
    continued(project, "whole")
    source = project / "source"
    shutil.copytree(run_of(project, "first").adapter, source)
    for name, number in (("early", 1), ("late", 3)):
        run = train_run(project, run_name=name, from_adapter=source)
        steps = 0
        for event in run:
            steps += isinstance(event, Stepped)
            if steps == number:
                break
        run.close()
    shutil.rmtree(source)
    for name in ("early", "late"):
        events = list(train_run(project, run_name=name, resume=True))
        (resumed,) = of(Resumed, events)
        assert resumed.step == (0 if name == "early" else 2)
        whole, cut = weights_of(run_of(project, "whole")), weights_of(run_of(project, name))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
        assert manifest_fault(run_of(project, name).path / "start") == ""


def test_a_damaged_copy_is_not_begun_with(project):
    run = train_run(project, run_name="cut", from_adapter=run_of(project, "first").path)
    next(event for event in run if isinstance(event, Stepped))
    run.close()
    weights = run_of(project, "cut").path / "start" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    # The adapter it was copied from is still there: then that one is taken.
    beginning = continuing.beginning_of(run_of(project, "cut"))
    assert beginning.folder == run_of(project, "first").adapter.resolve()
    shutil.rmtree(run_of(project, "first").path)
    with pytest.raises(AdapterError, match="not there as it was"):
        list(train_run(project, run_name="cut", resume=True))


def test_going_back_after_a_divergence_leads_to_the_adapter_it_began_with(project, monkeypatch):
    original, calls = loop.train_step, []

    def diverging(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise loop.DivergedError("the run diverged", where="step 1")
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", diverging)
    events = continued(project, overrides={"retry_on_divergence": "true"})
    evaluated = [event.loss for event in of(Evaluated, events) if event.step == 0]
    assert len(evaluated) == 2
    assert evaluated[0] == evaluated[1]


def test_the_shape_is_the_adapters_and_what_differs_is_said(project):
    path = project / "lora" / "lora.yaml"
    path.write_text(
        path.read_text().replace("lora_r: 4", "lora_r: 8").replace("lora_alpha: 8.0", "lora_alpha: 2.0")
    )
    events = continued(project, overrides={"lora_dropout": "0.3"})
    run = run_of(project, "second")
    assert any("lora_r, lora_alpha: as the adapter has it" in event.what for event in of(Noted, events))
    settings = run.record()["settings"]
    assert (settings["lora_r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8.0, 0.3)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.3)
    with pytest.raises(SettingsError, match="'lora_r' cannot be changed"):
        continued(project, "third", overrides={"lora_r": "8"})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_made_elsewhere_is_taken_with_a_warning(project, models):
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["o_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(project / "theirs")
    events = continued(project, place=project / "theirs")
    assert any("does not say on which weights" in event.what for event in of(Warned, events))
    run = run_of(project, "second")
    assert run.record()["settings"]["lora_target_modules"] == ["o_proj"]
    (entry,) = run.lineage()
    assert entry.keys() == {"sha256", "path"}


def test_another_base_is_refused_before_a_run_is_made(project, models):
    with pytest.raises(IncompatibleLowRankAdapter, match="another base"):
        continued(project, overrides={"model": str(models[1])})
    assert [path.name for path in (project / "runs").iterdir()] == ["first"]


@pytest.mark.parametrize("place", ["nowhere", "dataset"])
def test_where_there_is_no_adapter_it_is_said(project, place):
    with pytest.raises(AdapterError, match="no adapter to go on from"):
        continued(project, place=project / place)


def test_weights_that_older_versions_of_peft_wrote_must_be_converted_first(project, tmp_path):
    shutil.copytree(project / "runs" / "first" / "adapter", tmp_path / "old")
    weights = tmp_path / "old" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "old" / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(AdapterError, match="safetensors alone") as caught:
        continued(project, place=tmp_path / "old")
    assert "phinetune adapter convert" in caught.value.do


def test_resuming_and_beginning_with_an_adapter_exclude_each_other(project):
    with pytest.raises(SettingsError, match="has its adapter already"):
        continued(project, resume=True)


def test_further_training_that_does_not_help_is_said(project, monkeypatch):
    losses = iter([1.0, 1.5, 1.2, 1.4, 1.3])
    monkeypatch.setattr(
        loop,
        "validate",
        lambda *args: Validation(loss=next(losses), token_accuracy=0.5, num_trained_tokens=9),
    )
    events = continued(project)
    (said,) = [what for what in events[-1].summary["warnings"] if "did not lower the test loss" in what]
    assert "1.2000, and 1.0000 before it" in said
