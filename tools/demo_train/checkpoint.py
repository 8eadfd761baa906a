"""Checkpoints of a pre-training run as safetensors and JSON, and export to a folder transformers loads."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import Phi3ForCausalLM


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    probes: list[dict[str, float]] = field(default_factory=list)

    def copying(self) -> float:
        """Best accuracy per token so far on repeating unseen words."""
        return max((probe["repeat_tokens"] for probe in self.probes), default=0.0)


def save(folder: Path, model: Phi3ForCausalLM, optimisers: dict[str, Optimizer], progress: Progress) -> None:
    """Write beside and rename, so a broken write leaves the older checkpoint whole."""
    tensors = {f"model/{name}": weight.detach() for name, weight in model.named_parameters()}
    for kind, optimiser in optimisers.items():
        for index, state in optimiser.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"{kind}/{index}/{name}"] = torch.as_tensor(value)
    folder.mkdir(parents=True, exist_ok=True)
    # one file holds both, so weights and progress never disagree
    part = folder / "checkpoint.safetensors.part"
    save_file(tensors, part, metadata={"progress": json.dumps(asdict(progress))})
    os.replace(part, folder / "checkpoint.safetensors")


def load(folder: Path, model: Phi3ForCausalLM, optimisers: dict[str, Optimizer]) -> Progress:
    """Restore weights, optimiser states and progress; fresh progress where there is no checkpoint."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return Progress()
    tensors = load_file(path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"model/{name}"])
    for kind, optimiser in optimisers.items():
        whole = optimiser.state_dict()
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"{kind}/"):
                _, index, name = key.split("/")
                states.setdefault(int(index), {})[name] = value
        whole["state"] = states
        optimiser.load_state_dict(whole)
    return read_progress(folder)


def read_progress(folder: Path) -> Progress:
    """The progress part of a checkpoint."""
    from safetensors import safe_open

    with safe_open(folder / "checkpoint.safetensors", framework="pt") as handle:
        return Progress(**json.loads(handle.metadata()["progress"]))
