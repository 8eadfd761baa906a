"""Training on from an adapter that is there already: its shape, its weights, and where it came from.

Knows nothing of how training goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.base.errors import AdapterError, SettingsError, UserError
from phinetune.base.events import Event, Noted, Warned
from phinetune.base.files import committed_dir, manifest_fault, sha256_file
from phinetune.lora.attach import Adapter
from phinetune.lora.files import CONFIG_FILE, WEIGHTS_FILE, check_base, load_weights
from phinetune.lora.peft_format import read_peft
from phinetune.lora.settings import LoraSettings
from phinetune.lora.weights import AdapterWeights
from phinetune.models.loading import Base
from phinetune.reports.history import read_history
from phinetune.runs.folder import RunFolder, find_run
from phinetune.training.settings import TrainingSettings

COPY = "start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """The adapter a run begins with. `lineage` tells of it and those before it, oldest first."""

    folder: Path
    weights: AdapterWeights
    lineage: tuple[Mapping[str, str], ...]


def read_beginning(place: Path) -> Beginning:
    """The adapter of a PEFT directory, of a run, or of a project's newest run. Raises `AdapterError`."""
    folder = place
    if not (place / CONFIG_FILE).is_file():
        try:
            folder = find_run(place).adapter
        except UserError:
            folder = place
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(
            "there is no adapter to go on from",
            where=str(folder),
            why=f"{CONFIG_FILE} is not in it",
            do="name a finished run, or an adapter as a PEFT directory (see 'phinetune adapter convert')",
        )
    weights = read_peft(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(
            "training goes on from safetensors alone",
            where=str(folder),
            why=f"{WEIGHTS_FILE} is not in it",
            do=f"phinetune adapter convert {shlex.quote(str(folder))} NEW, and go on from that",
        )
    return Beginning(folder=folder.resolve(), weights=weights, lineage=_lineage(folder, weights.metadata))


def beginning_of(run: RunFolder) -> Beginning | None:
    """What a run to be resumed began with, from its own copy; None when it began with fresh weights.

    Raises `AdapterError` when the adapter is lost or not the same any more.
    """
    lineage = run.lineage()
    if not lineage:
        return None
    copy, first = run.path / COPY, Path(lineage[-1]["path"])
    found = copy if copy.is_dir() and not manifest_fault(copy) else first
    weights_file = found / WEIGHTS_FILE
    if not weights_file.is_file() or sha256_file(weights_file) != lineage[-1]["sha256"]:
        raise AdapterError(
            "the adapter that the run began with is not there as it was",
            where=str(found),
            do=f"put it back to {first}, or start a new run: leave --resume out",
        )
    return Beginning(folder=found, weights=read_peft(found), lineage=tuple(lineage))


def keep_copy(run: RunFolder, beginning: Beginning) -> None:
    """Make the run independent of where the adapter came from."""
    with committed_dir(run.path / COPY) as temporary:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(beginning.folder / name, temporary / name)


def with_shape(
    settings: TrainingSettings, beginning: Beginning, overrides: Mapping[str, str]
) -> tuple[TrainingSettings, list[str]]:
    """The settings with the adapter's rank, scale and targets, and the keys that differed from it.

    Raises `SettingsError` when such a key was set for this run: a shape cannot be changed by training.
    """
    shape = _shape_settings(beginning.weights.settings)
    differing = [key for key, value in shape.items() if getattr(settings, key) not in (None, value)]
    for key in differing:
        if key in overrides:
            raise SettingsError(
                f"'{key}' cannot be changed when training goes on from an adapter",
                where=f"--set {key}={overrides[key]}",
                why=f"the adapter has {shape[key]!r}",
                do="leave it out, or train a new adapter: without --from-adapter",
            )
    return settings.model_copy(update=shape), differing


def attached(base: Base, beginning: Beginning, dropout: float) -> Adapter:
    """The adapter on its base, to be trained with `dropout`.

    Raises `IncompatibleLowRankAdapter` when it belongs to another base.
    """
    shape = dataclasses.replace(beginning.weights.settings, dropout=dropout)
    weights = dataclasses.replace(beginning.weights, settings=shape)
    where = str(beginning.folder)
    name = weights.metadata.get("base_name") or weights.base_name or "the base it was trained on"
    do = f"set model to {name}, or train a new adapter: leave --from-adapter out"
    check_base(weights, where=where, base_sha256=base.sha256, do=do)
    return load_weights(base.model, weights, where=where)


def notes_on(beginning: Beginning, differing: list[str]) -> Iterator[Event]:
    """What a reader must know of where the run begins."""
    generations = len(beginning.lineage)
    older = f", which had {generations - 1} before it" if generations > 1 else ""
    yield Noted(what=f"training goes on from {beginning.folder}{older}")
    if differing:
        yield Noted(what=f"{', '.join(differing)}: as the adapter has it, not as in lora.yaml")
    if not beginning.weights.metadata.get("base_sha256"):
        yield Warned(
            what="the adapter does not say on which weights it was trained; its names and shapes fit the base"
        )


def worse_than_it_began(run: RunFolder) -> Iterator[str]:
    """A word when further training has not lowered the test loss of the adapter it began with."""
    found = read_history(run.events)
    first = next((entry for entry in found.evaluations if entry.step == 0), None)
    if not run.lineage() or not first or not found.best or first.loss is None or found.best.loss is None:
        return
    if found.best.loss >= first.loss:
        yield (
            f"further training did not lower the test loss: {found.best.loss:.4f}, and {first.loss:.4f} "
            "before it; the adapter it began with may be the better one"
        )


def _lineage(folder: Path, metadata: Mapping[str, str]) -> tuple[Mapping[str, str], ...]:
    try:
        older = json.loads(metadata.get("lineage") or "[]")
        assert all(isinstance(entry, dict) for entry in older)
    except (ValueError, AssertionError, TypeError):
        raise AdapterError(
            "the adapter's lineage cannot be read",
            where=str(folder / WEIGHTS_FILE),
            why="the metadata 'lineage' is no list of entries",
            do="convert it with 'phinetune adapter convert', which leaves unknown metadata out",
        ) from None
    known = ("run_id", "step", "train_sha256", "base_sha256")
    own = {key: metadata[key] for key in known if key in metadata}
    sha256 = sha256_file(folder / WEIGHTS_FILE)
    return (*older, {**own, "sha256": sha256, "path": str(folder.resolve())})


def _shape_settings(shape: LoraSettings) -> dict[str, Any]:
    """The settings that say what an adapter looks like; dropout is not one: it is how it is trained."""
    named: dict[str, Any] = {"lora_r": shape.rank, "lora_alpha": shape.alpha}
    for field in dataclasses.fields(shape):
        for key in (field.name, f"lora_{field.name}"):
            if key in TrainingSettings.model_fields and field.name != "dropout":
                named[key] = getattr(shape, field.name)
    return named
