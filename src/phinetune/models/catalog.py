"""Turn the name of a base model into a folder on this machine.

The network is used only for a hub name that is not in the local cache, which is a user's wish.
Knows nothing of weights or text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

from phinetune.base.errors import ModelError
from phinetune.base.files import sha256_file

DEMO = "demo"
# Above this size a digest takes long enough to be worth keeping.
LARGE_BYTES = 100_000_000
_WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*")


def demo_folder() -> Path:
    """The bundled base model."""
    return Path(__file__).parent / "demo"


def find_model(name: str, *, root: Path | None = None) -> Path:
    """The folder of `demo`, a local folder (relative to `root`), or a Hugging Face name.

    Raises `ModelError` naming what is missing; weights must be safetensors.
    """
    if name == DEMO:
        return _checked(demo_folder(), name)
    for folder in (Path(name), (root or Path()) / name):
        if folder.is_dir():
            return _checked(folder.resolve(), name)
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") != 1
    if looks_local:
        raise ModelError(
            f"there is no model folder '{name}'",
            where="model",
            do="write demo, the path of a folder with config.json, or a Hugging Face name like "
            "microsoft/Phi-3-mini-4k-instruct",
        )
    return _checked(_from_hub(name), name)


def is_on_this_machine(name: str) -> bool:
    """Whether `find_model` would find the model without fetching anything."""
    if name == DEMO or Path(name).is_dir():
        return True
    try:
        return name.count("/") == 1 and bool(weight_files(_in_hub_cache(name)))
    except (OSError, ValueError):  # of huggingface_hub: not there, or no name of a model
        return False


def _in_hub_cache(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(_WANTED), local_files_only=True))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted by name."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))


def refuse_quantized_files(folder: Path) -> None:
    """Raise `ModelError` when a folder's weights were written in few bits by another program."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise ModelError(
            "the model's files are quantised already",
            where=str(folder),
            why=f"config.json says quantization_config: {method}; merging needs the original weights",
            do="name the model in its original precision; quantize: nf4 or int8 keeps it small in memory",
        )


def num_weights(folder: Path) -> int:
    """The entries of all tensors of a model folder, by the files' headers."""
    total = 0
    for path in weight_files(folder):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, path.stat().st_size)) or "{}")
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def weights_sha256(folder: Path) -> str:
    """One digest over all weight files, by name and content: the identity of a base model.

    A digest of gigabytes takes seconds, so it is kept in a cache under the user's home, keyed by
    path, size and time of change of each file.
    """
    files = weight_files(folder)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    is_large = sum(size for _, size, _ in stats) > LARGE_BYTES
    cache = Path.home() / ".cache" / "phinetune" / "weights" / key
    if is_large and cache.is_file():
        return cache.read_text(encoding="utf-8").strip()
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    if is_large:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.write_text(digest.hexdigest(), encoding="utf-8")
        except OSError:
            pass  # a read-only home costs the seconds again, nothing else
    return digest.hexdigest()


def _checked(folder: Path, name: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"'{name}' is not a model folder",
            where=str(folder),
            why="config.json is missing",
            do="name a folder in Hugging Face form",
        )
    if not weight_files(folder):
        others = sorted(path.name for path in folder.glob("*.bin"))
        raise ModelError(
            f"the model folder of '{name}' has no weights",
            where=str(folder),
            why=f"{others[0]} is a pickle file, which is never opened" if others else "no *.safetensors file",
            do="convert it to safetensors" if others else "download the model again, with its weights",
        )
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = list(_WANTED)
    try:
        folder = _in_hub_cache(name)
        if weight_files(folder):
            return folder
    except (LocalEntryNotFoundError, OSError):
        pass
    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE"):
        raise ModelError(
            f"'{name}' is not on this machine, and HF_HUB_OFFLINE forbids fetching it",
            where="model",
            do="unset HF_HUB_OFFLINE, or name a local folder, or write model: demo",
        )
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise ModelError(
            f"there is no model '{name}' on the hub, or it needs a token",
            where="model",
            do="check the name; for gated models run 'hf auth login'",
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"'{name}' is not on this machine and could not be fetched",
            where="model",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            do="check the network, name a local folder, or write model: demo",
        ) from None
