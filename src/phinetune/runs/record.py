"""What a run was: settings, data, base, versions and machine, as run.json and summary.json hold it.

Knows nothing of how training works.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.base.files import sha256_file
from phinetune.lora.attach import Adapter
from phinetune.models.classifier import CHATS, LABELS_KEY, READS_KEY, TEXTS
from phinetune.models.loading import Base
from phinetune.training.checkpoint import Origin
from phinetune.training.forecast import Forecast
from phinetune.training.packing import Sequences
from phinetune.training.plan import Plan, SetPlan
from phinetune.training.settings import TrainingSettings
from phinetune.training.sharing import Sharing

if TYPE_CHECKING:
    from phinetune.runs.kept_states import KeptStates

PACKAGES = ("phinetune", "torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A data file as it was when the run began."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> DataFile:
        return cls(path=str(path), sha256=sha256_file(path))


def machine() -> dict[str, Any]:
    """The computer and the versions that a result depends on."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpu": gpu,
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def origin_of(settings: TrainingSettings, base: Base, files: Sequence[DataFile]) -> Origin:
    """What the checkpoints of a run with these settings, base and data belong to."""
    # Defaults stay out: a setting that a later version adds must not disown older checkpoints.
    text = json.dumps(settings.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return Origin(
        settings_sha256=hashlib.sha256(text.encode()).hexdigest(),
        base_sha256=base.sha256,
        train_sha256=files[0].sha256,
        test_sha256=files[1].sha256,
    )


def plan_values(
    plan: Plan,
    forecast: Forecast,
    adapter: Adapter,
    base: Base,
    batches: Mapping[str, int],
    *,
    sharing: Sharing | None = None,
    states: KeptStates | None = None,
    num_processes: int = 1,
) -> dict[str, Any]:
    """The plan as plain values, for the terminal and events.jsonl; without the row lists.

    `batches` are the settings that said `auto`, with the numbers found for them.
    """
    # asdict would copy every row.
    values = asdict(replace(plan, train_sequences=Sequences(()), test_sequences=Sequences(())))
    del values["train_sequences"], values["test_sequences"]
    processes = f"; {num_processes} processes, memory is of each" if num_processes > 1 else ""
    kept = f"; linear layers in {base.quantize}" if base.quantize != "none" else ""
    return {
        **values,
        "coverage": [asdict(row) for row in adapter.coverage],
        "method": adapter.settings.method,
        "compute": f"{base.device.type}, {base.compute.reason}{kept}{processes}",
        "batches": dict(batches),
        "sharing": asdict(sharing) if sharing else None,
        "kept_states": asdict(states) if states else None,
        "forecast": {**asdict(forecast), "total_seconds": forecast.total_seconds},
    }


def base_values(base: Base) -> dict[str, Any]:
    return {
        "name": base.name,
        "sha256": base.sha256,
        "dtype": base.compute.dtype_name,
        "quantize": base.quantize,
        "parameters": base.num_parameters,
    }


def data_values(files: Sequence[DataFile], plans: Sequence[SetPlan]) -> dict[str, Any]:
    return {
        name: {
            "path": file.path,
            "sha256": file.sha256,
            "examples": plan.num_used,
            "tokens": plan.num_tokens,
            "trained_tokens": plan.num_trained_tokens,
        }
        for name, file, plan in zip(("train", "test"), files, plans, strict=True)
    }


def _head_metadata(base: Base) -> dict[str, str]:
    """What the head of a classification tells apart, and what it reads."""
    if base.classifier is None:
        return {}
    reads = CHATS if base.classifier.reads_chats else TEXTS
    return {LABELS_KEY: json.dumps(list(base.classifier.names)), READS_KEY: reads}


def adapter_metadata(
    base: Base,
    settings: TrainingSettings,
    files: Sequence[DataFile],
    run_id: str,
    step: int,
    lineage: Sequence[Mapping[str, str]] = (),
) -> dict[str, str]:
    """The header of the adapter's weights: what they belong to and where they came from."""
    return {
        **({"lineage": json.dumps(list(lineage), sort_keys=True)} if lineage else {}),
        **({"quantize": base.quantize} if base.quantize != "none" else {}),
        **_head_metadata(base),
        "base_name": base.name,
        "base_sha256": base.sha256,
        "train_sha256": files[0].sha256,
        "test_sha256": files[1].sha256,
        "system_prompt": settings.system_prompt or "",
        "seed": str(settings.seed),
        "run_id": run_id,
        "step": str(step),
        "phinetune": version("phinetune"),
    }
