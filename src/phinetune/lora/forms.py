"""Which form a file or folder has, and one door for reading and writing all of them.

A reader gives the whole adapter or an error; a writer leaves the whole result or nothing. Knows
nothing of models.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import save

from phinetune.base.errors import AdapterError, UserError
from phinetune.base.files import committed_dir, write_atomically
from phinetune.lora.loralib_format import MergedParts, from_loralib, to_loralib
from phinetune.lora.mlx_format import read_mlx, write_mlx
from phinetune.lora.peft_config import parsed, read_config, settings_of
from phinetune.lora.peft_format import (
    CONFIG_FILE,
    CONFIG_KEY,
    from_peft_tensors,
    peft_header,
    peft_tensors,
    read_peft,
    write_peft,
)
from phinetune.lora.tensor_file import read_header, read_tensors
from phinetune.lora.torch_archive import read_torch_archive, write_torch_archive
from phinetune.lora.weights import AdapterWeights, require_updates_only

Form = Literal["peft", "single", "loralib", "mlx"]
FORMS: tuple[Form, ...] = get_args(Form)
SAFETENSORS = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a state dict of loralib does not say of itself."""

    alpha: float | None = None
    merged: Mapping[str, MergedParts] = field(default_factory=dict)
    fan_in_fan_out: bool = False


def form_of(path: Path) -> Form:
    """The form of a file or folder. Raises `AdapterError` when it is none that is known."""
    if path.is_dir():
        return "mlx" if "fine_tune_type" in _config(path) else "peft"
    if path.suffix == SAFETENSORS:
        return "single" if _has_settings(read_header(path)) else "loralib"
    if path.is_file() and (zipfile.is_zipfile(path) or path.suffix in (".pt", ".pth", ".bin")):
        return "loralib"
    raise AdapterError(
        "this is no adapter" if path.exists() else "there is no adapter here",
        where=str(path),
        why="an adapter is a PEFT or MLX folder, a .safetensors file, or a .pt file of loralib",
        do="name one of these, or a run folder",
    )


def read_adapter(path: Path, told: Told | None = None, *, takes_whole: bool = False) -> AdapterWeights:
    """The adapter of a file or folder of any known form; `told` is only for loralib's state dicts.

    One that holds weights trained whole (biases, modules, token rows) is an `AdapterError` unless
    `takes_whole`: a caller that looked at its updates alone would leave them out in silence.
    """
    weights = _read(path, told or Told())
    if not takes_whole:
        require_updates_only(weights, str(path))
    return weights


def _read(path: Path, told: Told) -> AdapterWeights:
    form = form_of(path)
    if form == "peft":
        return read_peft(path)
    if form == "mlx":
        return read_mlx(path, _config(path))
    if form == "single":
        return _read_single(path)
    tensors = read_tensors(path)[0] if path.suffix == SAFETENSORS else read_torch_archive(path)
    if told.alpha is None:
        raise AdapterError(
            "alpha is not known",
            where=str(path),
            why="a state dict of loralib holds A and B, not lora_alpha; a wrong one gives wrong answers",
            do="give the lora_alpha that it was trained with: --alpha 16",
        )
    return from_loralib(
        tensors,
        alpha=told.alpha,
        where=str(path),
        merged=told.merged,
        fan_in_fan_out=told.fan_in_fan_out,
    )


def write_adapter(weights: AdapterWeights, path: Path, form: Form, told: Told | None = None) -> str:
    """Write a new file or folder; returns what a reader must be told beside it, or "".

    Raises `UserError` when something is there already.
    """
    if path.exists() or path.is_symlink():
        raise UserError("something is there already", where=str(path), do="name a new file or folder")
    if form in ("loralib", "mlx"):
        require_updates_only(weights, str(path))  # these have no place for them
    if form == "single" and path.suffix != SAFETENSORS:
        raise UserError(
            "a single file would not be known by this name",
            where=str(path),
            do=f"name it {path.with_name(path.name + SAFETENSORS)}",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "peft":
        with committed_dir(path, has_manifest=False) as folder:
            write_peft(weights, folder)
    elif form == "mlx":
        with committed_dir(path, has_manifest=False) as folder:
            write_mlx(weights, folder, where=str(path))
    elif form == "single":
        _write_single(weights, path)
    else:
        tensors, alpha = to_loralib(weights, where=str(path), merged=(told or Told()).merged)
        if path.suffix == SAFETENSORS:
            write_atomically(path, save(tensors, {"format": "pt"}))
        else:
            write_torch_archive(path, tensors)
        return f"lora_alpha={alpha:g}" + (", fan_in_fan_out=True" if weights.is_transposed else "")
    return ""


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_config(folder / CONFIG_FILE)
    except AdapterError:
        return {}  # the reader of PEFT folders says what is wrong


def _has_settings(metadata: Mapping[str, str]) -> bool:
    return CONFIG_KEY in metadata or {"lora_r", "lora_alpha"} <= metadata.keys()


def _read_single(path: Path) -> AdapterWeights:
    tensors, metadata = read_tensors(path)
    text = metadata.pop(CONFIG_KEY, "")
    try:
        config = parsed(text) if text else {}
    except ValueError as error:
        raise AdapterError(
            "the metadata's adapter_config cannot be read",
            where=str(path),
            why=str(error),
            do="copy the file again",
        ) from None
    if not config:
        config = {"peft_type": "LORA", "r": metadata.get("lora_r"), "lora_alpha": metadata.get("lora_alpha")}
        config["base_model_name_or_path"] = metadata.get("base_name", "")
    return from_peft_tensors(tensors, config, settings_of(config, path), metadata, path)


def _write_single(weights: AdapterWeights, path: Path) -> None:
    """PEFT's tensors in one file, PEFT's config in its metadata."""
    write_atomically(path, save(peft_tensors(weights), peft_header(weights, weights.metadata)))
