"""Starting is quick: nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

LIMIT_S = 0.4
HEAVY = ("torch", "transformers", "matplotlib", "numpy", "huggingface_hub")


def seconds_of(arguments: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of one fresh Python."""
    wall, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - wall, used


@pytest.mark.parametrize("arguments", [["-c", "import phinetune"], ["-m", "phinetune", "--help"]])
def test_starting_is_quick(arguments: list[str]) -> None:
    """Best of five. Where other programs hold the processor, its time tells what is ours of the wall's."""
    runs = [seconds_of(arguments) for _ in range(5)]
    wall, used = (min(column) for column in zip(*runs, strict=True))
    print(f"\n{' '.join(arguments)}: {wall:.3f} s, {used:.3f} s of processor time")
    is_machine_busy = os.name == "posix" and os.getloadavg()[0] > (os.cpu_count() or 1)
    assert (used if is_machine_busy else wall) < LIMIT_S


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from phinetune.cli.main import run
run(["--help"])
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
