"""Write files and folders so that a crash leaves the old content or the new, never half of one.

The only place that renames. Knows nothing of what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from phinetune.base.errors import SpaceError

MANIFEST = "MANIFEST.json"
# What a disk without room says: it is full, or its user's share is.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_TEMPORARY, _TRASH = ".tmp-", ".trash-"


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Push a file or folder to the disk. Windows cannot open folders for this; there the rename must do."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems know no fsync of a folder; one that fails to write must be heard.
        if error.errno in {*_NO_ROOM, errno.EIO}:
            raise
    finally:
        os.close(handle)


def is_disk_full(error: OSError) -> bool:
    """Whether an error of the operating system says that there is no room left."""
    return error.errno in _NO_ROOM


@contextlib.contextmanager
def full_disk_said(path: Path) -> Iterator[None]:
    """Within the block a full disk is a `SpaceError` that names `path`."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise SpaceError(
            "the disk is full",
            where=str(path),
            why=f"it could not be written: {error.strerror}",
            do="free some space and start again; nothing was overwritten",
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step: a reader sees the old file or the new one.

    Raises `SpaceError` when the disk is full; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with full_disk_said(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextlib.contextmanager
def committed_file(final: Path) -> Iterator[Path]:
    """A temporary path beside `final` that becomes `final` when the block ends without an error.

    For files too large to be handed to `write_atomically`. Raises `SpaceError` when the disk is full; `final`
    is then as it was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with full_disk_said(final):
            yield temporary
            _sync(temporary)
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(final.parent)


@contextlib.contextmanager
def committed_dir(final: Path, *, has_manifest: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends without an error.

    Writes `MANIFEST.json` (size and sha256 of each file) last, then renames: a folder with a
    manifest is whole; folders that go on changing have none. An existing `final` is replaced only
    after the new one is complete.

    Raises `SpaceError` when the disk is full; `final` is then as it was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f"{_TEMPORARY}{final.name}-{uuid.uuid4().hex[:8]}")
    try:
        with full_disk_said(final):
            temporary.mkdir()
            yield temporary
            _seal(temporary, has_manifest)
            _put_in_place(temporary, final)
            _sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Two renames where there is an old folder, which comes back when the second fails."""
    if not final.exists():
        os.replace(temporary, final)
        return
    old = _moved_aside(final)
    try:
        os.replace(temporary, final)
    except BaseException:
        os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _moved_aside(folder: Path) -> Path:
    trash = folder.with_name(f"{_TRASH}{folder.name}-{uuid.uuid4().hex[:8]}")
    os.replace(folder, trash)
    return trash


def discard(folder: Path) -> None:
    """Delete a folder; interrupted anywhere, no half of it stays under its name."""
    shutil.rmtree(_moved_aside(folder), ignore_errors=True)


def clear_leftovers(folder: Path) -> list[str]:
    """Delete what a killed process left half written or half deleted; returns the names."""
    found = [path for path in folder.glob(".*") if path.name.startswith((_TEMPORARY, _TRASH))]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in found)


def _seal(folder: Path, has_manifest: bool) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    if has_manifest:
        entries = {
            path.relative_to(folder).as_posix(): {
                "size_bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path in files
        }
        manifest = folder / MANIFEST
        manifest.write_bytes(_manifest_bytes({"files": entries}))
        _sync(manifest)
    _sync(folder)


def _manifest_bytes(content: object) -> bytes:
    return json.dumps(content, indent=1).encode()


def manifest_fault(folder: Path) -> str:
    """Why a committed folder is not whole, or "" when every file is as its manifest says."""
    try:
        written = (folder / MANIFEST).read_bytes()
        content = json.loads(written)
        entries = content["files"]
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size_bytes"]:
                return f"{name} has {path.stat().st_size} bytes, the manifest says {entry['size_bytes']}"
            if sha256_file(path) != entry["sha256"]:
                return f"{name} does not match its sha256"
        # Not even a blank may differ: the manifest is the one file that no checksum covers.
        if written != _manifest_bytes(content):
            return "the manifest is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the manifest cannot be read ({type(error).__name__})"
    return ""


def require_free_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse early, with both numbers, when `folder`'s disk has less than `needed_bytes` left."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise SpaceError(
            f"not enough disk space for {purpose}",
            where=str(existing),
            why=f"{needed_bytes / 1e6:,.0f} MB are needed, {free_bytes / 1e6:,.0f} MB are free",
            do="free some space, or choose a folder on another disk",
        )
