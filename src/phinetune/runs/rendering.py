"""Data files as rendered rows on disk: made once, kept in the project, made anew when anything has changed.

    my-project/cache/3f0c…/   tokens.int32  rows.npy  key.json  MANIFEST.json

The name is a hash of the key: the data file, the model's tokenizer and template files, the settings that
rendering reads, the code that renders. Before rows are used, their files are compared with the manifest's
checksums; what does not fit is made anew. The folder can be deleted at any time. A file is read one row at
a time, whatever its size. Knows nothing of plans or training.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phinetune.base.errors import DataError
from phinetune.base.files import (
    clear_leftovers,
    committed_dir,
    discard,
    full_disk_said,
    manifest_fault,
    sha256_file,
)
from phinetune.base.locks import try_lock
from phinetune.data.conversation import Conversation, Example
from phinetune.data.reading import MAX_FINDINGS_KEPT, sound_examples
from phinetune.text.render import Renderer, joined
from phinetune.text.row_files import RowWriter, StoredRows, writing_rows
from phinetune.training.settings import TrainingSettings

CACHE = "cache"
NUM_KEPT = 8
_KEY_FILE, _LOCK_FILE = "key.json", ".lock"
_LAYOUT = 1
# Rows are rendered in groups: the tokenizer works on all texts of one at once.
_GROUP_ROWS, _GROUP_CHARACTERS = 1024, 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedFile:
    """The rows of a data file, its sha256, and what a user should hear about how they came about."""

    rows: StoredRows
    sha256: str
    notes: tuple[str, ...] = ()


def rendered_file(
    path: Path, project: Path, renderer: Renderer, model_folder: Path, settings: TrainingSettings
) -> RenderedFile:
    """The rows of a data file, from the project's cache where it has them.

    Raises `DataError` with all faults when a row cannot be read or trained on; nothing is kept then. Where
    the project cannot be written to, the rows lie in a temporary folder as long as they are used.
    """
    if not path.is_file():  # what a folder holds has no digest to be known by
        return RenderedFile(rows=_uncached(path, renderer, settings), sha256="")
    before, sha256 = _state(path), sha256_file(path)
    key = _key(path, sha256, model_folder, settings)
    cache = project / CACHE
    with contextlib.ExitStack() as stack:
        try:
            with full_disk_said(cache):
                stack.enter_context(_locked(cache))
        except OSError:
            return RenderedFile(rows=_uncached(path, renderer, settings), sha256=sha256)
        entry = cache / hashlib.sha256(key).hexdigest()[:16]
        notes = []
        if entry.exists():
            fault = _fault(entry, key)
            if not fault:
                with contextlib.suppress(OSError):
                    os.utime(entry)
                return RenderedFile(rows=StoredRows(entry, file=str(path)), sha256=sha256)
            notes.append(f"the tokenised data in {entry} is not used: {fault}; it is made anew")
        clear_leftovers(cache)
        with committed_dir(entry) as folder:
            _render(path, folder, renderer, settings)
            if _state(path) != before:
                raise DataError("the file was changed while it was read", where=str(path), do="start again")
            (folder / _KEY_FILE).write_bytes(key)
        _forget_oldest(cache)
        return RenderedFile(rows=StoredRows(entry, file=str(path)), sha256=sha256, notes=tuple(notes))


def cache_bytes(project: Path) -> int:
    """What a project's tokenised data takes on the disk."""
    entries = [path.parent for path in (project / CACHE).glob(f"*/{_KEY_FILE}")]
    return sum(path.stat().st_size for entry in entries for path in entry.iterdir())


def _render(path: Path, folder: Path, renderer: Renderer, settings: TrainingSettings) -> None:
    """Both files of the rows. Raises `DataError` for all faults of reading, or else for all of rendering."""
    faults: list[DataError] = []
    num_faults = 0
    with writing_rows(folder) as writer, _fewer_collections():
        for group in _groups(sound_examples(path)):
            try:
                _add(writer, group, renderer, settings)
            except DataError as error:
                found = [fault for fault in error.findings if isinstance(fault, DataError)] or [error]
                num_faults += len(found)
                faults += found[: MAX_FINDINGS_KEPT - len(faults)]
    if faults:
        raise joined(faults, num_faults)


@contextlib.contextmanager
def _fewer_collections() -> Iterator[None]:
    """Within the block what exists already is not searched for garbage again and again: a fifth faster."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _add(writer: RowWriter, group: list[Example], renderer: Renderer, settings: TrainingSettings) -> None:
    rows = renderer.examples(group, system_prompt=settings.system_prompt, loss_on=settings.loss_on)
    writer.add(rows, are_chats=[isinstance(example, Conversation) for example in group])


def _groups(examples: Iterator[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    num_characters = 0
    for example in examples:
        group.append(example)
        num_characters += (
            sum(len(message.content) for message in example.messages)
            if isinstance(example, Conversation)
            else len(example.text)
        )
        if len(group) == _GROUP_ROWS or num_characters > _GROUP_CHARACTERS:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


def _uncached(path: Path, renderer: Renderer, settings: TrainingSettings) -> StoredRows:
    folder = Path(tempfile.mkdtemp(prefix="phinetune-rows-"))
    try:
        with full_disk_said(folder):
            _render(path, folder, renderer, settings)
        rows = StoredRows(folder, file=str(path))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(rows, shutil.rmtree, folder, True)
    return rows


def _key(path: Path, sha256: str, model_folder: Path, settings: TrainingSettings) -> bytes:
    """All that the rows depend on."""
    files = sorted([*model_folder.glob("*.json"), *model_folder.glob("*.jinja")])
    content: dict[str, Any] = {
        "layout": _LAYOUT,
        "data": sha256,
        "suffixes": path.suffixes,  # they tell how the file is read
        "model": {file.name: sha256_file(file) for file in files},
        "system_prompt": settings.system_prompt,
        "loss_on": settings.loss_on,
        "code": _code_sha256(),
        "versions": {name: version(name) for name in ("jinja2", "tokenizers")},
    }
    return json.dumps(content, indent=1, sort_keys=True).encode()


@functools.cache
def _code_sha256() -> str:
    """Of the modules that read and render: a version that changes them makes all rows anew."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted([*(root / "data").rglob("*.py"), *(root / "text").rglob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _fault(entry: Path, key: bytes) -> str:
    """Why an entry cannot be used, or ""."""
    if fault := manifest_fault(entry):
        return fault
    try:
        if (entry / _KEY_FILE).read_bytes() != key:
            return "it belongs to other data"
        StoredRows(entry, file="")
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _state(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    return None


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One process at a time makes rows; others wait and find them made."""
    if not cache.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        (cache / ".gitignore").write_text("*\n", encoding="utf-8")
    handle = os.open(cache / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not try_lock(handle):
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _forget_oldest(cache: Path) -> None:
    """Keep the entries used last; one that another process has open on Windows stays."""
    entries = sorted(path.parent for path in cache.glob(f"*/{_KEY_FILE}"))
    entries.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in entries[NUM_KEPT:]:
        with contextlib.suppress(OSError):
            discard(entry)
