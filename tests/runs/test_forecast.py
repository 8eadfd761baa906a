"""A run is fitted into the memory that is there, or refused with changes that would really fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phinetune.base.errors import SpaceError
from phinetune.base.events import Evaluated, Finished, Planned, Reforecast, Stepped
from phinetune.lora.attach import attach
from phinetune.models.catalog import num_weights
from phinetune.models.device import choose
from phinetune.models.loading import load_base
from phinetune.runs import forecast as forecast_module
from phinetune.runs.forecast import Forecaster, refuse_base_too_large
from phinetune.runs.pace import Pace
from phinetune.runs.prepare import lora_settings, prepare
from phinetune.runs.project import SETTINGS_FILE
from phinetune.runs.train_run import train_run
from phinetune.training.lora_yaml import load_settings

AUTO = {"finetune_train_batch_size": "auto", "finetune_test_batch_size": "auto"}


@pytest.fixture
def forecaster_of(new_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A forecaster of a tiny project, with the memory that is free."""

    def make(free: float, **changes: Any) -> Forecaster:
        monkeypatch.setattr(forecast_module, "available_bytes", lambda device: int(free))
        project = new_project(**changes)
        settings = load_settings(project / SETTINGS_FILE)
        base = load_base(settings.model, device_name="cpu", dtype="float32", root=project)
        adapter = attach(base.model, lora_settings(settings), seed=0)
        return Forecaster(base, adapter, prepare(project, settings))

    return make


def needed(forecaster: Forecaster, **changes: Any) -> float:
    settings = forecaster.settings.model_copy(update=changes)
    return forecaster.of(settings).peak_memory_bytes - forecaster.probe.held_bytes


def wide(forecaster: Forecaster) -> Forecaster:
    """As if each token held a megabyte: then batches decide."""
    forecaster.costs = replace(forecaster.costs, saved_per_token=1e6, tokens_multiple=1, is_cpu=False)
    return forecaster


def test_auto_takes_the_largest_batch_that_fits_and_keeps_the_update(forecaster_of):
    many = {**AUTO, "gradient_accumulation_steps": 2, "varied_seqlen": True}
    forecaster = wide(forecaster_of(1e15, **many))
    assert forecaster.resolved() == {
        "finetune_test_batch_size": 64, "finetune_train_batch_size": 8, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    sizes = {size: needed(forecaster, finetune_train_batch_size=size) for size in (1, 2, 4, 8)}
    assert sizes[1] < sizes[2] < sizes[4] < sizes[8]
    forecaster.available_bytes = int(sizes[4])
    found = forecaster.resolved()
    assert (found["finetune_train_batch_size"], found["gradient_accumulation_steps"]) == (4, 2)
    forecaster.available_bytes = int(sizes[2]) - 1
    found = forecaster.resolved()
    assert (found["finetune_train_batch_size"], found["gradient_accumulation_steps"]) == (1, 8)
    settings = forecaster.settings
    assert settings.model_copy(update=found).effective_batch_size == settings.effective_batch_size


def test_without_auto_nothing_is_chosen(forecaster_of):
    assert forecaster_of(1e15).resolved() == {}


def test_what_does_not_fit_is_refused_with_changes_that_fit(forecaster_of):
    forecaster = wide(forecaster_of(1e15, finetune_train_batch_size=4, varied_seqlen=True))
    settings = forecaster.settings
    assert forecaster.refuse_too_large(settings).peak_memory_bytes > 0
    forecaster.available_bytes = int(needed(forecaster)) - 1
    with pytest.raises(SpaceError) as caught:
        forecaster.refuse_too_large(settings)
    first = caught.value.do.split(";")[0]
    assert first.startswith("write finetune_train_batch_size: 1, gradient_accumulation_steps: 4 (")
    assert caught.value.do.count(";") <= 2
    for change, forecast in forecaster.changes(settings):
        if change in caught.value.do:
            assert forecaster.fits(forecast)
    forecaster.available_bytes = 0
    with pytest.raises(SpaceError, match="does not fit") as caught:
        forecaster.refuse_too_large(settings)
    assert "smaller model" in caught.value.do


def test_every_proposed_change_takes_less_memory(forecaster_of):
    forecaster = wide(
        forecaster_of(1e15, finetune_train_batch_size=4, lora_r=64, compare_nsamples=100, varied_seqlen=True)
    )
    whole = forecaster.of(forecaster.settings).peak_memory_bytes
    changes = dict(forecaster.changes(forecaster.settings))
    assert "gradient_checkpointing: true" in changes
    assert "dtype: bfloat16" in changes
    assert any(change.startswith("lora_r") for change in changes)
    assert all(forecast.peak_memory_bytes <= whole for forecast in changes.values())


def test_a_base_that_does_not_fit_is_refused_before_it_is_loaded(models, monkeypatch):
    monkeypatch.setattr(forecast_module, "available_bytes", lambda device: num_weights(models[0]) * 3)
    with pytest.raises(SpaceError, match="base model does not fit") as caught:
        refuse_base_too_large(models[0], choose("cpu", "float32"))
    assert "bfloat16" in caught.value.do
    refuse_base_too_large(models[0], choose("cpu", "bfloat16"))


def test_a_refused_run_leaves_no_folder(new_project, monkeypatch):
    monkeypatch.setattr(forecast_module, "available_bytes", lambda device: 1_000_000)
    project = new_project()
    with pytest.raises(SpaceError, match="the run does not fit"):
        list(train_run(project))
    assert not list((project / "runs").glob("*"))


def test_a_run_with_auto_shows_and_keeps_what_it_chose(new_project):
    project = new_project(**AUTO, num_training_steps=2, eval_steps=2, save_steps=2)
    events = list(train_run(project, run_name="one"))
    planned = next(event for event in events if isinstance(event, Planned))
    assert planned.plan["batches"]["finetune_train_batch_size"] == 4
    summary = next(event for event in events if isinstance(event, Finished)).summary
    assert summary["forecast"].keys() <= summary.keys()


def test_the_pace_of_the_steps_makes_the_new_forecast(forecaster_of):
    forecaster = forecaster_of(1e15, num_training_steps=100, eval_steps=50, save_steps=50)
    expected = replace(forecaster.of(forecaster.settings), comparison_seconds=7.0)
    plan = forecaster.plan
    tokens = plan.train.num_tokens // plan.steps_per_epoch
    pace = Pace(forecaster.settings, plan, expected)
    evaluated = Evaluated(
        step=0, epoch=0.0, loss=1.0, token_accuracy=0.5, num_trained_tokens=5, is_best=False, seconds=3.0
    )
    found = list(pace.after(evaluated))
    for step in range(1, 30):
        # The first five are slow, and are no measure of those to come.
        stepped = Stepped(
            step=step, num_steps=100, epoch=0.0, loss=1.0, learning_rate=1.0, grad_norm=1.0,
            num_tokens=tokens, num_trained_tokens=5, seconds=9.0 if step <= 5 else 2.0,
        )  # fmt: skip
        found += pace.after(stepped)
    (again,) = found
    assert isinstance(again, Reforecast)
    left = 80 * plan.train.num_tokens / plan.steps_per_epoch / tokens * 2.0 + 2 * 3.0 + 7.0
    assert again.seconds_left == pytest.approx(left)
    assert again.seconds == pytest.approx(5 * 9.0 + 15 * 2.0 + 3.0 + left)
