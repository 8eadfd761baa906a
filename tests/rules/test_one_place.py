"""Dangerous or far-reaching calls stand in one known place, or nowhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "phinetune"

# What is called or imported, and the files that may do so.
ALLOWED: dict[str, set[str]] = {
    "os.rename": set(),
    "os.replace": {"base/files.py"},
    "os.system": set(),
    "eval": set(),
    "exec": set(),
    "torch.load": set(),
    "torch.save": set(),
    "pickle": set(),
    "httpx": set(),
    "requests": set(),
    "subprocess": {"runs/processes.py", "kernels/library.py"},
    "urllib.request": set(),
    "trust_remote_code": set(),
}


def uses(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are used, modules that are imported, names of keyword arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.keyword) and node.arg and not is_false(node.value):
            yield node.arg
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield node.value


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def breaches(source: str, file: str) -> list[str]:
    used = set(uses(ast.parse(source)))
    return [
        f"{file} uses {name}"
        for name, files in ALLOWED.items()
        if file not in files and any(use == name or use.startswith(f"{name}.") for use in used)
    ]


def test_dangerous_calls_stand_in_one_place() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert files
    found = [
        breach
        for path in files
        for breach in breaches(path.read_text("utf-8"), path.relative_to(SOURCE).as_posix())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import os; os.replace(a, b)",
        "from os import rename",
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load(path)",
        "load(path, trust_remote_code=True)",
        "eval('1')",
        "import subprocess",
        "import urllib.request",
    ],
)
def test_a_dangerous_call_is_seen(source: str) -> None:
    assert breaches(source, "somewhere.py")
