"""Safetensors files, read whole or not at all. Knows nothing of what the tensors mean."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phinetune.base.errors import AdapterError


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a file; empty where there is none."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors by name, in the order of the file, and the metadata."""
    with _opened(path) as file:
        try:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, TypeError, ValueError) as error:
            raise _unreadable(path, str(error)) from None
        return tensors, dict(file.metadata() or {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file; a full disk is an `OSError`, as with any other file."""
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        # safetensors writes in Rust: a full disk is told in words, not as an OSError.
        for code in (errno.ENOSPC, errno.EDQUOT):
            if f"os error {code}" in str(error):
                raise OSError(code, os.strerror(code), str(path)) from error
        raise


def _opened(path: Path) -> Any:
    if path.exists() and not path.is_file():
        raise _unreadable(path, "it is no file")  # reading a pipe may never end
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise AdapterError(
            "there are no adapter weights here",
            where=str(path),
            why=f"{path.name} is missing",
            do="copy the whole adapter folder",
        ) from None
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, f"not a whole safetensors file: {error}") from None


def _unreadable(path: Path, why: str) -> AdapterError:
    return AdapterError(
        "the adapter's weights cannot be read",
        where=str(path),
        why=why,
        do="copy the file again, or use an earlier checkpoint",
    )
