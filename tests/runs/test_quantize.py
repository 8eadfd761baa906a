"""A run on a quantised base: recorded, answered on the base it was trained on, merged into the original."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import phinetune
from phinetune import api
from phinetune.base.errors import AdapterError, ModelError
from phinetune.base.events import Finished, Planned
from phinetune.lora.files import read_metadata
from phinetune.lora.forms import read_adapter
from phinetune.lora.settings import LoraSettings
from phinetune.lora.weights import AdapterWeights
from phinetune.models.merged import merge
from phinetune.models.quantized import QuantizedLinear
from phinetune.runs.again import trained_quantization
from phinetune.runs.folder import RunFolder
from phinetune.runs.train_run import train_run

KINDS = ("int8", "nf4")


def run_of(project, name="r"):
    return RunFolder(project / "runs" / name)


@pytest.fixture(autouse=True)
def _without_the_pictures(monkeypatch):
    monkeypatch.setattr("phinetune.runs.proof.report_html", lambda path: None)
    monkeypatch.setattr("phinetune.runs.proof.loss_plot", lambda events, path: None)
    monkeypatch.setattr("phinetune.training.forecast._seconds_per_token", lambda *args: (1e-4, 1e-4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_how_its_base_was_kept_everywhere(new_project, kind):
    project = new_project(quantize=kind)
    events = list(train_run(project, run_name="r"))
    run = run_of(project)
    assert json.loads(run.summary.read_text())["base"]["quantize"] == kind
    assert run.record()["base"]["quantize"] == kind
    assert read_metadata(run.adapter)["quantize"] == kind
    plan = next(event.plan for event in events if isinstance(event, Planned))
    assert f"linear layers in {kind}" in plan["compute"]
    assert isinstance(events[-1], Finished)


def test_answers_come_from_the_base_as_it_was_in_training(new_project):
    project = new_project(quantize="int8")
    list(train_run(project, run_name="r"))
    run = run_of(project)

    def is_quantised(model):
        return any(isinstance(layer, QuantizedLinear) for layer in model.base.model.modules())

    by_run, by_adapter = phinetune.load(run.path), phinetune.load(run.adapter, dtype="float32")
    assert is_quantised(by_run)
    assert is_quantised(by_adapter)
    assert not is_quantised(phinetune.load(run.path, quantize="none"))
    assert by_run.base.quantize == "int8"
    assert isinstance(by_run.chat("Say red!", max_new_tokens=3), str)
    summary = json.loads(run.summary.read_text())
    assert api.evaluate(run.path).evaluation() == summary["evaluation"]


def test_an_adapter_of_an_unknown_quantisation_is_refused():
    weights = AdapterWeights(updates={}, settings=LoraSettings(), metadata={"quantize": "fp3"})
    with pytest.raises(AdapterError, match="'fp3'") as caught:
        trained_quantization(None, weights, "somewhere")
    assert "quantize='none'" in caught.value.do


def test_merging_goes_into_the_weights_of_the_files(new_project, models, tmp_path):
    project = new_project(quantize="int8")
    list(train_run(project, run_name="r"))
    weights = read_adapter(run_of(project).adapter)
    report = merge(weights, str(models[0]), tmp_path / "merged", where="r")
    before, after = (load_file(folder / "model.safetensors") for folder in (models[0], tmp_path / "merged"))
    for name, update in weights.updates.items():
        exact = before[f"{name}.weight"] + update.delta_OI()
        assert torch.equal(after[f"{name}.weight"], exact.to(before[f"{name}.weight"].dtype))
    assert report.logit_error < 1e-4


def test_merging_into_files_of_few_bits_is_refused(new_project, models, tmp_path):
    project = new_project(quantize="int8")
    list(train_run(project, run_name="r"))
    folder = shutil.copytree(models[0], tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised already") as caught:
        merge(read_adapter(run_of(project).adapter), str(folder), tmp_path / "merged", where="r")
    assert "original precision" in caught.value.do
    assert not (tmp_path / "merged").exists()
