"""Files and folders are old or new, never half; a manifest finds every change."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest

from phinetune.base import files
from phinetune.base.errors import SpaceError
from phinetune.base.files import (
    committed_dir,
    committed_file,
    manifest_fault,
    require_free_space,
    sha256_file,
    write_atomically,
)


def commit(final, content="new", **kwargs):
    with committed_dir(final, **kwargs) as folder:
        (folder / "deep").mkdir()
        (folder / "a.txt").write_text(content)
        (folder / "deep" / "b.bin").write_bytes(b"\0" * 3000)
    return final


def stop_halfway(final, error):
    with committed_dir(final) as folder:
        (folder / "a.txt").write_text("half")
        raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_committed_folder_is_whole_and_alone(tmp_path):
    final = commit(tmp_path / "runs" / "one")
    assert manifest_fault(final) == ""
    assert names(final) == ["MANIFEST.json", "a.txt", "deep"]
    assert names(tmp_path / "runs") == ["one"]
    entry = json.loads((final / "MANIFEST.json").read_text())["files"]["deep/b.bin"]
    assert entry == {"size_bytes": 3000, "sha256": sha256_file(final / "deep" / "b.bin")}


def test_a_folder_that_goes_on_changing_has_no_manifest(tmp_path):
    assert names(commit(tmp_path / "one", has_manifest=False)) == ["a.txt", "deep"]


def test_a_new_folder_replaces_the_old_one(tmp_path):
    commit(tmp_path / "best", "old")
    (tmp_path / "best" / "stale.txt").write_text("of the old one")
    commit(tmp_path / "best", "new")
    assert (tmp_path / "best" / "a.txt").read_text() == "new"
    assert names(tmp_path / "best") == ["MANIFEST.json", "a.txt", "deep"]
    assert names(tmp_path) == ["best"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_old_folder(tmp_path, error):
    commit(tmp_path / "best", "old")
    with pytest.raises(error):
        stop_halfway(tmp_path / "best", error())
    assert (tmp_path / "best" / "a.txt").read_text() == "old"
    assert manifest_fault(tmp_path / "best") == ""
    assert names(tmp_path) == ["best"]


def test_an_error_inside_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(ValueError, match="stop"):
        stop_halfway(tmp_path / "best", ValueError("stop"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("num_renames", [0, 1])
def test_the_old_folder_survives_a_failing_rename(tmp_path, monkeypatch, num_renames):
    """The first rename moves the old folder aside, the second puts the new one in place."""
    commit(tmp_path / "best", "old")
    real, done = os.replace, []

    def failing(source, target):
        if len(done) == num_renames:
            done.append(None)
            raise OSError(errno.EACCES, "held by another program")
        done.append(None)
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="held by another program"):
        commit(tmp_path / "best", "new")
    assert (tmp_path / "best" / "a.txt").read_text() == "old"
    assert manifest_fault(tmp_path / "best") == ""
    assert names(tmp_path) == ["best"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda f: flip(f / "deep" / "b.bin"), "deep/b.bin does not match its sha256"),
        (lambda f: os.truncate(f / "deep" / "b.bin", 2999), "deep/b.bin has 2999 bytes"),
        (lambda f: (f / "a.txt").unlink(), "a.txt is missing"),
        (lambda f: (f / "MANIFEST.json").unlink(), "the manifest cannot be read"),
        (lambda f: os.truncate(f / "MANIFEST.json", 40), "the manifest cannot be read"),
        (lambda f: (f / "MANIFEST.json").write_text("[]"), "the manifest cannot be read"),
        (
            lambda f: (f / "MANIFEST.json").write_text('{"files": {"a.txt": 3}}'),
            "the manifest cannot be read",
        ),
    ],
)
def test_a_manifest_finds_damage(tmp_path, damage, fault):
    final = commit(tmp_path / "one")
    damage(final)
    assert manifest_fault(final).startswith(fault)


def test_write_atomically_replaces_a_file_whole(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    write_atomically(path, b"new\n")
    assert path.read_bytes() == b"new\n"
    assert names(tmp_path) == ["run.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SpaceError, match="disk is full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["run.json"]


def test_a_full_disk_is_said_and_leaves_the_old_folder(tmp_path):
    commit(tmp_path / "best", "old")
    with pytest.raises(SpaceError, match="disk is full") as caught:
        stop_halfway(tmp_path / "best", OSError(errno.ENOSPC, "No space left on device"))
    assert str(tmp_path / "best") in str(caught.value)
    assert (tmp_path / "best" / "a.txt").read_text() == "old"


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError):
        stop_halfway(tmp_path / "best", PermissionError(errno.EACCES, "denied"))


def test_too_little_space_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000_000))
    require_free_space(tmp_path / "not" / "yet", 5_000_000, "a run")
    with pytest.raises(SpaceError) as caught:
        require_free_space(tmp_path / "not" / "yet", 7_000_001, "a run")
    assert "7 MB are needed, 5 MB are free" in str(caught.value)
    assert f"where: {tmp_path}\n" in str(caught.value)


def test_a_committed_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"

    def fail_half_way():
        with committed_file(path) as temporary:
            temporary.write_text("half", "utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(path.parent.iterdir()) == []
    with committed_file(path) as temporary:
        temporary.write_text("whole", "utf-8")
        assert not path.exists()
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    assert path.read_text("utf-8") == "whole"
