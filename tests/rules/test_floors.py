"""Imports point downwards, and the lower floors live without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WITHOUT_TORCH = """
import importlib, pkgutil, sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
for package in {packages}:
    module = importlib.import_module(package)
    for entry in pkgutil.walk_packages(getattr(module, "__path__", []), package + "."):
        importlib.import_module(entry.name)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


def test_imports_point_downwards() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    result = subprocess.run([*command, "--no-logo", "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("package", ["phinetune", "phinetune.base", "phinetune.data", "phinetune.text"])
def test_lower_floors_need_no_torch(package: str) -> None:
    packages = [package] if package != "phinetune" else []
    result = run_python("import phinetune\n" + WITHOUT_TORCH.format(packages=packages))
    assert result.returncode == 0, result.stderr


def test_the_torch_block_works() -> None:
    result = run_python(WITHOUT_TORCH.format(packages=[]) + "import torch")
    assert "ModuleNotFoundError" in result.stderr or "ImportError" in result.stderr
