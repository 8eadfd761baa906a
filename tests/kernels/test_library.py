"""Kernels are compiled once for a machine; where that cannot be, nothing is lost but time."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from phinetune.kernels import library


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    library._loaded.cache_clear()
    yield
    library._loaded.cache_clear()


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, library._COMPILERS)), reason="no C compiler on this machine"
)


@needs_compiler
def test_they_are_compiled_once_and_anew_when_the_flags_change(tmp_path, monkeypatch):
    ran = []

    def counted(command, **options):
        ran.append(command)
        return run(command, **options)

    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", counted)
    for _ in range(2):
        assert library.library(torch.bfloat16) is not None
        library._loaded.cache_clear()
    compiled = [command for command in ran if "-o" in command]
    assert len(compiled) == 1
    monkeypatch.setattr(library, "_FLAGS", (*library._FLAGS, "-DOTHER"))
    assert library.library(torch.bfloat16) is not None
    folder = tmp_path / ".cache/phinetune/kernels"
    assert len(list(folder.iterdir())) == 2
    assert folder.stat().st_mode & 0o077 == 0


def test_without_a_compiler_it_is_said_what_one_would_bring(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert library.library(torch.float32) is None
    assert library.described(torch.float32).startswith("no C compiler (cc, gcc, clang)")


def test_a_compiler_that_fails_is_named_with_its_first_error(tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x.c: error: no such flag' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(compiler))
    assert library.library(torch.bfloat16) is None
    assert library.described(torch.bfloat16) == f"no kernels, for {compiler} failed: x.c: error: no such flag"


def test_a_home_that_cannot_be_written_to_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "file")
    (tmp_path / "file").write_text("")
    assert library.library(torch.float32) is None


def test_other_types_have_none():
    assert library.library(torch.float64) is None
