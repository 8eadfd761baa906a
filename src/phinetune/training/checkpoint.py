"""Checkpoints: the whole state of a training as a folder that is there whole or not at all.

checkpoints/step-000064/
    adapter_config.json  adapter_model.safetensors   the adapter, as a PEFT directory
    weights.safetensors        the adapter's own weights, where its file holds them in another form
    optimizer.safetensors      what the optimizer keeps for each weight
    best_model.safetensors     the best weights so far, unless they are the adapter's own
    state.json                 the counters, and what the checkpoint belongs to
    MANIFEST.json              size and sha256 of each file, written last

The position in the data is the step: order and dropout are derived from it. Knows nothing of run
folders, and restores nothing that does not verify.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phinetune.base.errors import UserError
from phinetune.base.files import committed_dir, discard, manifest_fault
from phinetune.lora.files import save_adapter
from phinetune.lora.peft_format import read_peft
from phinetune.lora.tensor_file import read_tensors, write_tensors
from phinetune.training.state import Counters, TrainState

OPTIMIZER_FILE, BEST_FILE, STATE_FILE = "optimizer.safetensors", "best_model.safetensors", "state.json"
OWN_FILE = "weights.safetensors"
_NAME = re.compile(r"step-(\d{6,})")
_FLOAT_BYTES = 4
# The weights, two moments of AdamW, and the best weights.
_NUM_COPIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a checkpoint belongs to; one of another origin is not picked."""

    settings_sha256: str
    base_sha256: str
    train_sha256: str
    test_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """The newest whole checkpoint (None when there is none at all), and newer ones with their faults."""

    path: Path | None
    skipped: tuple[tuple[str, str], ...] = ()


def checkpoint_bytes(num_stored: int) -> int:
    """The room one checkpoint takes at most, for an adapter of so many numbers (`Adapter.num_stored`)."""
    return _NUM_COPIES * _FLOAT_BYTES * num_stored + 200_000


def save_checkpoint(
    folder: Path,
    state: TrainState,
    origin: Origin,
    *,
    base_name: str,
    metadata: Mapping[str, str],
    versions: Mapping[str, str],
) -> None:
    """Write `folder` in one step. Raises `SpaceError` when the disk is full; nothing has changed then."""
    record = {
        "counters": dataclasses.asdict(counters_of(state)),
        "origin": dataclasses.asdict(origin),
        "versions": {**versions, "threads": str(torch.get_num_threads())},
    }
    with committed_dir(folder) as temporary:
        save_adapter(state.adapter, temporary, base_name=base_name, metadata=metadata)
        if state.adapter.has_other_form:
            write_tensors(temporary / OWN_FILE, state.adapter.snapshot(), {})
        if moments := dict(_optimizer_tensors(state)):  # none before the first step
            write_tensors(temporary / OPTIMIZER_FILE, moments, {})
        if state.best_weights and state.best_step != state.step:
            write_tensors(temporary / BEST_FILE, state.best_weights, {})
        text = json.dumps(_without_infinity(record), indent=1, allow_nan=False)
        (temporary / STATE_FILE).write_text(text + "\n", encoding="utf-8")


def load_checkpoint(folder: Path, state: TrainState) -> dict[str, str]:
    """Set `state` to what was saved; returns the versions it was saved under.

    The folder must be one that `newest_valid` picked.
    """
    record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    values = record["counters"]
    if values["best_loss"] is None:
        values["best_loss"] = math.inf
    state.set_counters(Counters(**values))
    if state.adapter.has_other_form:
        state.adapter.restore(_copies(folder / OWN_FILE))
    else:
        state.adapter.take(read_peft(folder))
    own_best = state.adapter.snapshot() if state.best_step else {}
    best, moments = folder / BEST_FILE, folder / OPTIMIZER_FILE
    state.best_weights = _copies(best) if best.is_file() else own_best
    _restore_optimizer(state, _copies(moments) if moments.is_file() else {})
    versions: dict[str, str] = record["versions"]
    return versions


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """All tensors of a state on the CPU, by name; with `counters_of` everything that changes."""
    return {
        **{f"adapter/{name}": weight for name, weight in state.adapter.snapshot().items()},
        **{f"best/{name}": weight for name, weight in state.best_weights.items()},
        **{f"optimizer/{name}": value for name, value in _optimizer_tensors(state)},
    }


def set_state(state: TrainState, counters: Counters, tensors: Mapping[str, Tensor]) -> None:
    """Set `state` to what `counters_of` and `state_tensors` gave."""

    def part(prefix: str) -> dict[str, Tensor]:
        begin = f"{prefix}/"
        return {name.removeprefix(begin): value for name, value in tensors.items() if name.startswith(begin)}

    state.set_counters(counters)
    state.adapter.restore(part("adapter"))
    state.best_weights = part("best")
    _restore_optimizer(state, part("optimizer"))


def newest_valid(checkpoints: Path, origin: Origin) -> Pick:
    """The newest checkpoint that is whole and belongs to `origin`.

    Raises `UserError`, naming the fault of each, when there are some but none can be used.
    """
    skipped: list[tuple[str, str]] = []
    for folder in steps_newest_first(checkpoints):
        fault = _fault(folder, origin)
        if not fault:
            return Pick(path=folder, skipped=tuple(skipped))
        skipped.append((folder.name, fault))
    if skipped:
        raise UserError(
            "no checkpoint of the run can be used",
            where=str(checkpoints),
            why="; ".join(f"{name}: {fault}" for name, fault in skipped),
            do="restore a checkpoint from a backup, or start a new run without --resume",
        )
    return Pick(path=None)


def prune(checkpoints: Path, *, keep: int) -> int:
    """Delete what is older than the newest `keep` whole checkpoints; returns how many were deleted."""
    num_whole = num_deleted = 0
    for folder in steps_newest_first(checkpoints):
        if num_whole < keep:
            num_whole += not manifest_fault(folder)
        else:
            discard(folder)
            num_deleted += 1
    return num_deleted


def steps_newest_first(checkpoints: Path) -> list[Path]:
    """The folders with a checkpoint's name, whole or not."""
    found = [(match, path) for path in checkpoints.glob("*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda item: int(item[0][1]), reverse=True)]


def _fault(folder: Path, origin: Origin) -> str:
    if fault := manifest_fault(folder):
        return fault
    try:
        record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        saved = record["origin"]
        Counters(**record["counters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE_FILE} cannot be read ({type(error).__name__})"
    changed = [name for name, value in dataclasses.asdict(origin).items() if saved.get(name) != value]
    return f"it belongs to another run: {', '.join(changed)} differ" if changed else ""


def counters_of(state: TrainState) -> Counters:
    """The counters of a state, apart from it."""
    return Counters(**{name: getattr(state, name) for name in Counters.__dataclass_fields__})


def _optimizer_tensors(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    for name, weight in state.adapter.named_parameters():
        for key, value in state.optimizer.state.get(weight, {}).items():
            yield f"{name}.{key}", torch.as_tensor(value).detach().to("cpu", copy=True)


def _restore_optimizer(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    content = state.optimizer.state_dict()
    content["state"] = {}
    # torch numbers the weights in the order of the groups, which need not be the adapter's.
    weights = [weight for group in state.optimizer.param_groups for weight in group["params"]]
    places = {id(weight): place for place, weight in enumerate(weights)}
    for name, weight in state.adapter.named_parameters():
        kept = {
            key.removeprefix(f"{name}."): value
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        if kept:
            content["state"][places[id(weight)]] = kept
    state.optimizer.load_state_dict(content)


def _copies(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, apart from it: the file is deleted while they are in use."""
    return {name: value.clone() for name, value in read_tensors(path)[0].items()}


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
