"""The whole road: a project's lora.yaml and data in, a proven adapter in a run folder out.

Every check that can be made beforehand is made before the run folder exists. The caller sees only
events. Knows nothing of terminals.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from phinetune.base.errors import DivergedError, SettingsError, SpaceError
from phinetune.base.events import (
    Event,
    EventLog,
    Finished,
    Noted,
    Planned,
    Stage,
    Stopped,
)
from phinetune.base.files import require_free_space
from phinetune.evaluation.compare import Progress
from phinetune.lora.attach import Adapter
from phinetune.models.catalog import find_model
from phinetune.models.classifier import attach_to
from phinetune.models.device import choose
from phinetune.models.loading import Base, load_base
from phinetune.runs.continuing import attached, beginning_of, keep_copy, notes_on, read_beginning, with_shape
from phinetune.runs.folder import checked_run_path, create_run
from phinetune.runs.following import batches_told, common_facts, settings_told, shape_told, take_part
from phinetune.runs.forecast import Forecaster, refuse_base_too_large
from phinetune.runs.kept_states import kept_states, with_kept_states
from phinetune.runs.prepare import lora_settings, prepare, prepared_base
from phinetune.runs.processes import Processes, launched_place
from phinetune.runs.project import SETTINGS_FILE
from phinetune.runs.record import base_values, data_values, machine, plan_values
from phinetune.runs.resume import find_unfinished, refuse_changes, unfinished_note
from phinetune.runs.road import Road
from phinetune.runs.sinks.reporting import Reporter, require_installed
from phinetune.runs.stopping import StopRequest
from phinetune.text.render import Renderer
from phinetune.training.checkpoint import checkpoint_bytes
from phinetune.training.lora_yaml import read_settings
from phinetune.training.settings import TrainingSettings
from phinetune.training.sharing import sharing_of


def train_run(
    project: Path,
    *,
    run_name: str | None = None,
    overrides: Mapping[str, str] | None = None,
    resume: bool = False,
    from_adapter: Path | None = None,
    stop: StopRequest | None = None,
    on_progress: Progress | None = None,
    nproc: int = 1,
    shard: bool = False,
) -> Iterator[Event]:
    """Train a project's adapter and compare it with its base; the last event is `Finished`.

    With `resume` the named run, or the newest interrupted one, goes on after its last checkpoint. With
    `from_adapter` a new run begins with the weights of that adapter (a PEFT directory or a run). Once
    `stop` is wanted a checkpoint is saved after the step, and the last event is `Stopped`.
    `on_progress(done, total)` counts examples while base and adapter are compared. With `nproc` that many
    processes of this machine share the work, and with `shard` the base too; under torchrun its processes
    do, and only the first has events.

    Raises `UserError` before any folder is made when the input is wrong, `DivergedError` when the
    loss stops being finite. Closing the generator ends the run; its last checkpoint stays.
    """
    place = launched_place()
    if place and place.rank > 0:
        take_part(project, place, stop or StopRequest(), is_sharded=shard)
        return
    with Processes(project, nproc, is_sharded=shard) as processes:
        yield from _lead(
            project, run_name, overrides, resume, from_adapter, stop or StopRequest(), on_progress, processes
        )


def _lead(
    project: Path,
    run_name: str | None,
    overrides: Mapping[str, str] | None,
    resume: bool,
    from_adapter: Path | None,
    stop: StopRequest,
    on_progress: Progress | None,
    processes: Processes,
) -> Iterator[Event]:
    """The run in its first process."""
    if resume and from_adapter:
        raise SettingsError(
            "a run that is resumed has its adapter already",
            where="--from-adapter",
            do="leave out --from-adapter, or --resume",
        )
    found = find_unfinished(project, run_name) if resume else None
    if found and found.summary:
        yield Noted(what=f"run '{found.run.run_id}' is finished: there is nothing to resume")
        yield Finished(summary=found.summary)
        return
    path = found.run.path if found else checked_run_path(project, run_name)
    if not found:
        yield from unfinished_note(project)
    overrides = {**(found.overrides if found else {}), **(overrides or {})}
    read = read_settings(project / SETTINGS_FILE, overrides)
    settings = read.settings
    for note in read.notes:
        yield Noted(what=note)
    require_installed(settings.report_to)
    beginning = beginning_of(found.run) if found else from_adapter and read_beginning(from_adapter)
    if beginning:
        settings, differing = with_shape(settings, beginning, overrides)
        yield from notes_on(beginning, differing)
    if beginning and settings.task == "classification":
        raise SettingsError(
            "a classification begins with an adapter of its own",
            where="--from-adapter",
            why="its head belongs to the classes of its data",
            do="leave --from-adapter out",
        )
    yield Stage(name="read", detail=settings.finetune_dataset)
    prepared = prepare(project, settings)
    for note in prepared.notes:
        yield Noted(what=note)
    yield Stage(name="load", detail=settings.model)
    compute = choose(settings.device, settings.dtype)
    if not processes.is_sharded:
        refuse_base_too_large(
            find_model(settings.model, root=project),
            compute,
            processes.num_here,
            quantize=settings.quantize,
        )
    ranks = processes.begin(compute.device.type, settings_told(settings, compute))
    base = load_base(
        settings.model,
        device_name=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        root=project,
        is_sharded=ranks.is_sharded,
    )
    ranks.require_same(common_facts(base, prepared))
    base = prepared_base(base, prepared)
    if found:
        refuse_changes(found, settings, base, prepared.files)
    _check_lengths(settings, base, prepared.renderer)
    if beginning:
        adapter = attached(base, beginning, settings.lora_dropout)
    else:
        adapter = attach_to(base, lora_settings(settings), seed=settings.seed)
    ranks.from_first(shape_told(adapter))
    forecaster = Forecaster(base, adapter, prepared, ranks, num_here=processes.num_here)
    # A run that goes on keeps its batches: another split of an update would round differently.
    batches = found.record.get("batches", {}) if found else forecaster.resolved()
    prepared = replace(prepared, settings=settings.model_copy(update=batches))
    expected = forecaster.refuse_too_large(prepared.settings)
    ranks.from_first(batches_told(batches))
    if not found:
        require_free_space(path.parent, _room(adapter), "the run's checkpoints")
    kept = None
    if not found or found.record.get("kept_states"):
        kept = kept_states(project, base, prepared, ranks, is_required=found is not None)
    values = plan_values(
        prepared.plan,
        expected,
        adapter,
        base,
        batches,
        sharing=sharing_of(
            prepared.settings, forecaster.sequences, prepared.train.rendered, base.device.type == "cpu"
        ),
        states=kept,
        num_processes=ranks.size,
    )
    planned = Planned(
        plan={
            **values,
            **({"classes": list(prepared.classes.names)} if prepared.classes else {}),
            **({"from_adapter": str(beginning.folder)} if beginning else {}),
        }
    )
    yield planned

    run_json: dict[str, Any] = (
        found.record
        if found
        else {
            "run_id": path.name,
            "status": "running",
            "started": time.time(),
            "overrides": overrides,
            "settings": settings.model_dump(mode="json"),
            "batches": batches,
            "kept_states": kept is not None,
            "base": base_values(base),
            "data": data_values(prepared.files, (prepared.plan.train, prepared.plan.test)),
            "lineage": list(beginning.lineage) if beginning else [],
            "machine": machine(),
        }
    )
    run_json["processes"] = ranks.size
    run = found.run if found else create_run(path, run_json)
    if beginning and not found:
        keep_copy(run, beginning)
    log = EventLog(run.events)
    status = "failed"

    def record_status(status: str) -> None:
        run.write_json(run.run_json, {**run_json, "status": status, "ended": time.time()})

    try:
        if found:
            run_json.pop("ended", None)
            run.write_json(run.run_json, {**run_json, "status": "running"})
        else:
            log.append(planned)
        if kept:
            yield Stage(name="keep states", detail=f"below block {kept.first_block}")
            base = with_kept_states(project, base, prepared, kept)
        road = Road(
            run=run,
            prepared=prepared,
            base=base,
            adapter=adapter,
            expected=expected,
            log=log,
            stop=stop,
            on_progress=on_progress,
            processes=processes,
        )
        reporter = Reporter(settings.report_to, run.path, run_json["settings"])
        for event in reporter.reported(road.events(is_resumed=found is not None)):
            log.append(event)
            if isinstance(event, Finished):
                # All is done before a caller hears of it, even one that stops listening there.
                status = "succeeded"
                record_status(status)
            elif isinstance(event, Stopped):
                status = "interrupted"
            yield event
    except (KeyboardInterrupt, GeneratorExit):
        status = "succeeded" if status == "succeeded" else "interrupted"
        raise
    except DivergedError:
        status = "diverged"
        raise
    finally:
        # A disk that is full leaves "running", which no process holds any more: as good as interrupted.
        with contextlib.suppress(SpaceError):
            record_status(status)
        log.close()


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


def _room(adapter: Adapter) -> int:
    """Two checkpoints and one being written, and the adapter: the best so far, its successor, the result."""
    return 3 * checkpoint_bytes(adapter.num_stored) + 3 * 4 * adapter.num_stored + 20_000_000
