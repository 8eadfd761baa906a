"""What the other processes of a run do: the same steps as the first on their share of the data.

They read the project and its base, and write nothing. Knows nothing of run folders.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phinetune.base.errors import DivergedError
from phinetune.base.events import Trained
from phinetune.lora.attach import Adapter
from phinetune.lora.settings import LoraSettings
from phinetune.models.classifier import attach_to
from phinetune.models.device import Compute
from phinetune.models.loading import Base, load_base
from phinetune.runs.forecast import Forecaster
from phinetune.runs.prepare import Prepared, prepare, prepared_base
from phinetune.runs.processes import Place, use_own_device
from phinetune.runs.proof import compare_with_base
from phinetune.runs.record import package_versions
from phinetune.runs.road import may_retry
from phinetune.runs.stopping import StopRequest
from phinetune.training.distributed import Ranks, joined
from phinetune.training.loop import start, train
from phinetune.training.lora_yaml import validated
from phinetune.training.settings import TrainingSettings
from phinetune.training.state import TrainState


def settings_told(settings: TrainingSettings, compute: Compute) -> bytes:
    """What the first process tells the others to train with: device and type as it has chosen them."""
    chosen = {"device": compute.device.type, "dtype": compute.dtype_name}
    return json.dumps(settings.model_dump(mode="json") | chosen).encode()


def shape_told(adapter: Adapter) -> bytes:
    """The shape of the first process's adapter, which may be one that training goes on from."""
    return json.dumps(dataclasses.asdict(adapter.settings)).encode()


def shape_of(told: bytes) -> LoraSettings:
    """What `shape_told` told."""
    values: dict[str, Any] = json.loads(told)
    # JSON knows lists alone; every sequence of the settings is a tuple.
    sequences = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return LoraSettings(**{**values, **sequences})


def batches_told(batches: Mapping[str, int]) -> bytes:
    """The numbers the first process has found for batch sizes that said `auto`."""
    return json.dumps(dict(batches)).encode()


def common_facts(base: Base, prepared: Prepared) -> Mapping[str, str]:
    """What has to be the same in every process, by name."""
    train, test = prepared.files
    return {
        "base": base.sha256,
        "train data": train.sha256,
        "test data": test.sha256,
        **package_versions(),
    }


def follow(project: Path, place: Place, ranks: Ranks, stop: StopRequest) -> None:
    """Take part in the run of the first process until its training has ended, in whatever way.

    Raises `UserError` when this process has not the data, base or versions of the first one, and
    `LostProcessError` when another process is gone.
    """
    task = ranks.from_first()
    if not task:
        return
    settings = validated(json.loads(task), {}, "the first process's settings")
    use_own_device(settings.device, place)
    prepared = prepare(project, settings)
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
    adapter = attach_to(base, shape_of(ranks.from_first()), seed=settings.seed)
    if ranks.is_sharded:
        Forecaster(base, adapter, prepared, ranks)
    settings = settings.model_copy(update=json.loads(ranks.from_first()))
    prepared = dataclasses.replace(prepared, settings=settings)
    state = start(base, adapter, settings)
    with stop.heard():
        is_trained = _trained(base, state, prepared, ranks, stop)
    if is_trained and not ranks.any(stop.is_wanted) and ranks.is_sharded:
        compare_with_base(prepared, base, adapter)


def _trained(base: Base, state: TrainState, prepared: Prepared, ranks: Ranks, stop: StopRequest) -> bool:
    """Train beside the first process; whether it came to its end."""
    settings, plan = prepared.settings, prepared.plan
    while True:
        ranks.share_state(state)
        events = train(base, state, settings, plan, prepared.train.rendered, prepared.test.rendered, ranks)
        try:
            for event in events:
                if isinstance(event, Trained):
                    return True
                if ranks.any(stop.is_wanted):
                    return False
        except DivergedError:
            if not may_retry(settings, state):
                return False


def take_part(project: Path, place: Place, stop: StopRequest, *, is_sharded: bool) -> None:
    """`follow` in a process that torchrun has started."""
    with joined(place.rank, place.size, is_sharded=is_sharded) as ranks:
        follow(project, place, ranks, stop)
