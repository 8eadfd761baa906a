"""The whole road: a project's lora.yaml and data in, a proven adapter in a run folder out.

Every check that can be made beforehand is made before the run folder exists. The caller sees only
events. Knows nothing of terminals.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from phinetune.base.errors import DivergedError, SettingsError
from phinetune.base.events import Event, EventLog, Finished, Planned, Saved, SaveDue, Stage, Trained
from phinetune.base.files import committed_dir, require_free_space
from phinetune.evaluation.compare import Progress
from phinetune.lora.attach import Adapter, LoraSettings, attach
from phinetune.lora.files import load_adapter, save_adapter
from phinetune.models.loading import Base, load_base
from phinetune.runs.folder import RunFolder, checked_run_path, create_run
from phinetune.runs.prepare import Prepared, prepare
from phinetune.runs.project import SETTINGS_FILE
from phinetune.runs.proof import prove
from phinetune.runs.record import adapter_metadata, base_values, data_values, machine, plan_values
from phinetune.text.render import Renderer
from phinetune.training.forecast import Forecast, forecast
from phinetune.training.loop import TrainState, start, train
from phinetune.training.lora_yaml import load_settings
from phinetune.training.settings import TrainingSettings


def train_run(
    project: Path,
    *,
    run_name: str | None = None,
    overrides: Mapping[str, str] | None = None,
    on_progress: Progress | None = None,
) -> Iterator[Event]:
    """Train a project's adapter and compare it with its base; the last event is `Finished`.

    `on_progress(done, total)` counts examples while base and adapter are compared.

    Raises `UserError` before any folder is made when the input is wrong, `DivergedError` when the
    loss stops being finite. Closing the generator ends the run; its last checkpoint stays.
    """
    path = checked_run_path(project, run_name)
    settings = load_settings(project / SETTINGS_FILE, overrides)
    yield Stage(name="read", detail=settings.finetune_dataset)
    prepared = prepare(project, settings)
    yield Stage(name="load", detail=settings.model)
    base = load_base(settings.model, device_name=settings.device, dtype=settings.dtype, root=project)
    _check_lengths(settings, base, prepared.renderer)
    adapter = attach(base.model, lora_settings(settings), seed=settings.seed)
    expected = forecast(base, adapter, settings, prepared.plan, prepared.train.rendered)
    require_free_space(path.parent, 6 * 4 * adapter.num_parameters + 20_000_000, "the run's checkpoints")
    planned = Planned(plan=plan_values(prepared.plan, expected, adapter, base))
    yield planned

    run_json = {
        "run_id": path.name,
        "status": "running",
        "started": time.time(),
        "settings": settings.model_dump(mode="json"),
        "base": base_values(base),
        "data": data_values(prepared.files, (prepared.plan.train, prepared.plan.test)),
        "machine": machine(),
    }
    run = create_run(path, run_json)
    log = EventLog(run.events)
    status = "failed"
    try:
        log.append(planned)
        for event in _trained_and_proven(run, prepared, base, adapter, expected, on_progress):
            log.append(event)
            if isinstance(event, Finished):
                # All is done before a caller hears of it, even one that stops listening there.
                status = "succeeded"
                run.write_json(run.run_json, {**run_json, "status": status, "ended": time.time()})
            yield event
    except (KeyboardInterrupt, GeneratorExit):
        status = "succeeded" if status == "succeeded" else "interrupted"
        raise
    except DivergedError:
        status = "diverged"
        raise
    finally:
        log.close()
        run.write_json(run.run_json, {**run_json, "status": status, "ended": time.time()})


def lora_settings(settings: TrainingSettings) -> LoraSettings:
    """The part of the settings that shapes the adapter."""
    return LoraSettings(
        rank=settings.lora_r,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules,
    )


def _check_lengths(settings: TrainingSettings, base: Base, renderer: Renderer) -> None:
    for name in ("finetune_train_seqlen", "finetune_test_seqlen"):
        if getattr(settings, name) > base.max_length:
            raise SettingsError(
                f"{name} ({getattr(settings, name)}) is longer than the model's context",
                where="lora.yaml",
                why=f"{base.name} has positions for {base.max_length} tokens",
                do=f"write {name}: {base.max_length}, or less",
            )
    if renderer.tokenizer.vocab_size > base.vocab_size:
        raise SettingsError(
            "the tokenizer has more tokens than the model",
            where=str(base.folder),
            why=f"{renderer.tokenizer.vocab_size} tokens, {base.vocab_size} rows in the embedding",
            do="use the tokenizer that belongs to the model",
        )


def _trained_and_proven(
    run: RunFolder,
    prepared: Prepared,
    base: Base,
    adapter: Adapter,
    expected: Forecast,
    on_progress: Progress | None,
) -> Iterator[Event]:
    settings, plan = prepared.settings, prepared.plan
    yield Stage(name="train", detail=f"{plan.num_steps} steps")
    state = start(base, adapter, settings)
    trained: Trained | None = None
    for event in train(base, state, settings, plan, prepared.train.rendered, prepared.test.rendered):
        if isinstance(event, SaveDue):
            yield _save(run, prepared, base, state)
            continue
        if isinstance(event, Trained):
            trained = event
        yield event
    assert trained is not None
    _write(run.adapter, prepared, base, adapter, run.run_id, state.best_step)
    # What counts is the adapter on disk: the proof is made with it, not with what is in memory.
    adapter.detach(base.model)
    adapter = load_adapter(base.model, run.adapter, base_sha256=base.sha256)
    yield from prove(run, prepared, base, adapter, trained, expected, on_progress)


def _save(run: RunFolder, prepared: Prepared, base: Base, state: TrainState) -> Saved:
    """A checkpoint of this step, and the best one so far beside it."""
    folder = run.checkpoint(state.step)
    _write(folder, prepared, base, state.adapter, run.run_id, state.step)
    if state.best_weights:
        now = state.adapter.snapshot()
        state.adapter.restore(state.best_weights)
        _write(run.best, prepared, base, state.adapter, run.run_id, state.best_step)
        state.adapter.restore(now)
    run.prune_checkpoints()
    return Saved(step=state.step, path=str(folder))


def _write(folder: Path, prepared: Prepared, base: Base, adapter: Adapter, run_id: str, step: int) -> None:
    metadata = adapter_metadata(base, prepared.settings, prepared.files, run_id, step)
    with committed_dir(folder) as temporary:
        save_adapter(adapter, temporary, base_name=base.name, metadata=metadata)
