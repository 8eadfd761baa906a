"""Adapters as PEFT directories: `adapter_config.json` and `adapter_model.safetensors`.

The config holds only the keys that every PEFT version reads. The safetensors metadata says which
base and which settings the weights belong to. Knows nothing of runs or training.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from phinetune.base.errors import AdapterError, IncompatibleLowRankAdapter, nearest
from phinetune.lora.attach import Adapter, LoraSettings, attach, linear_layers, require_bare

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Options of PEFT that change what the weights mean; each must be off, or the file is refused.
_UNSUPPORTED = {
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "modules_to_save": None,
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Ways of starting that change the weights of the base, which are not in the adapter's file.
_CHANGING_STARTS = ("corda", "loftq", "lora_ga", "olora", "pissa")


def save_adapter(adapter: Adapter, folder: Path, *, base_name: str, metadata: Mapping[str, str]) -> None:
    """Write the two files of a PEFT directory into an existing folder.

    `metadata` goes into the safetensors header, for example `base_sha256`.
    """
    settings = adapter.settings
    is_transposed = any(layer.is_transposed for layer in adapter.layers.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(adapter.target_modules),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": is_transposed,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    tensors = {f"{_PREFIX}{name}.weight": value.contiguous() for name, value in adapter.snapshot().items()}
    header = {"format": "pt", **metadata, "lora_r": str(settings.rank), "lora_alpha": str(settings.alpha)}
    try:
        save_file(tensors, folder / WEIGHTS_FILE, metadata=header)
    except SafetensorError as error:
        # safetensors writes in Rust: a full disk is told in words, not as an OSError.
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / WEIGHTS_FILE)) from error
        raise
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_metadata(folder: Path) -> dict[str, str]:
    """The metadata of an adapter's weights file; empty for a file made elsewhere."""
    with _opened(folder / WEIGHTS_FILE) as file:
        return dict(file.metadata() or {})


def load_adapter(model: nn.Module, folder: Path, *, base_sha256: str = "") -> Adapter:
    """Attach the adapter of a PEFT directory to `model`.

    Nothing is attached unless every tensor has its layer, every layer its tensors, and all shapes
    and values are right. Raises `AdapterError` for an unsound folder, `IncompatibleLowRankAdapter`
    for a sound one whose base (by `base_sha256`, names or shapes) is another model.
    """
    require_bare(model)
    settings = _read_config(folder / CONFIG_FILE)
    weights, metadata = _read_weights(folder / WEIGHTS_FILE)
    recorded = metadata.get("base_sha256", "")
    if recorded and base_sha256 and recorded != base_sha256:
        raise IncompatibleLowRankAdapter(
            "the adapter belongs to another base model",
            where=str(folder),
            why=f"it was trained on weights {recorded[:12]}…, this base has {base_sha256[:12]}…",
            do=f"load it on {metadata.get('base_name', 'the base it was trained on')}, or train a new one",
        )
    names = _checked_names(model, weights, settings.rank, folder)
    exact = LoraSettings(
        rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, target_modules=tuple(names)
    )
    adapter = attach(model, exact, seed=0)
    adapter.settings = settings
    adapter.restore(weights)
    return adapter


def _checked_names(model: nn.Module, weights: dict[str, torch.Tensor], rank: int, folder: Path) -> list[str]:
    linears = linear_layers(model)
    names = list(dict.fromkeys(key.rsplit(".", 1)[0] for key in weights))
    for name in names:
        if name not in linears:
            raise IncompatibleLowRankAdapter(
                f"the adapter has weights for '{name}', which the base does not have",
                where=str(folder),
                why=f"the nearest layer of the base is '{nearest(name, linears)}'",
                do="load the adapter on the base it was trained on",
            )
        layer = linears[name]
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        out_features, in_features = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
        for part, expected in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
            value = weights.get(f"{name}.{part}")
            if value is None:
                raise AdapterError(f"'{name}' has no {part}", where=str(folder), do="copy the file again")
            if tuple(value.shape) != tuple(expected):
                raise IncompatibleLowRankAdapter(
                    f"{part} of '{name}' has the wrong shape",
                    where=str(folder),
                    why=f"it is {tuple(value.shape)}; this base and rank {rank} need {tuple(expected)}",
                    do="load the adapter on the base it was trained on",
                )
            if not torch.isfinite(value).all():
                raise AdapterError(
                    f"{part} of '{name}' holds NaN or infinite values",
                    where=str(folder),
                    do="use an earlier checkpoint",
                )
    return names


def _read_config(path: Path) -> LoraSettings:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except FileNotFoundError:
        raise AdapterError(
            "this folder holds no adapter",
            where=str(path.parent),
            why=f"{CONFIG_FILE} is missing",
            do="name a run folder, its adapter/ folder, or another PEFT directory",
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterError(
            "the adapter's config cannot be read",
            where=str(path),
            why=str(error),
            do="copy the whole adapter folder again",
        ) from None
    if kind != "LORA":
        raise AdapterError(
            f"the adapter is of type {kind!r}", where=str(path), do="use a LoRA adapter (peft_type LORA)"
        )
    for key, off in _UNSUPPORTED.items():
        if key in config and config[key] != off and config[key]:
            raise AdapterError(
                f"the adapter uses '{key}', which is not supported",
                where=str(path),
                why=f"it is {json.dumps(config[key])}; ignoring it would give wrong answers",
                do="convert it to a plain LoRA adapter with the library that made it",
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING_STARTS):
        raise AdapterError(
            f"the adapter was started with '{start}', which is not supported",
            where=str(path),
            why="that way of starting changes the base's weights, so the file alone is not the whole adapter",
            do="convert it to a plain LoRA adapter with the library that made it",
        )
    try:
        settings = LoraSettings(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout") or 0.0),
            target_modules=_targets(config.get("target_modules")),
        )
        if not (settings.rank >= 1 and math.isfinite(settings.alpha) and 0 <= settings.dropout < 1):
            raise ValueError(f"r {config['r']}, alpha {settings.alpha}, dropout {settings.dropout}")
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            "the adapter's config lacks a usable value",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            do="copy the whole adapter folder again",
        ) from None
    return settings


def _targets(value: Any) -> tuple[str, ...] | None:
    return tuple(sorted(value)) if isinstance(value, list) else None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise AdapterError(
            "this folder holds no adapter weights", where=str(path), do="copy the whole adapter folder"
        ) from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            "the adapter's weights cannot be read",
            where=str(path),
            why=f"not a whole safetensors file: {error}",
            do="copy the file again, or use an earlier checkpoint",
        ) from None


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    weights: dict[str, torch.Tensor] = {}
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            name = key.removeprefix(_PREFIX).removesuffix(".weight")
            if not key.startswith(_PREFIX) or name.rsplit(".", 1)[-1] not in ("lora_A", "lora_B"):
                raise AdapterError(
                    f"the adapter holds a tensor of unknown meaning, '{key}'",
                    where=str(path),
                    do="use a plain LoRA adapter in PEFT's form",
                )
            weights[name] = file.get_tensor(key)
        metadata = dict(file.metadata() or {})
    if not weights:
        raise AdapterError("the adapter holds no weights", where=str(path), do="use an earlier checkpoint")
    return weights, metadata
