"""Starting is quick: nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

LIMIT_S = 0.4
HEAVY = ("torch", "transformers", "matplotlib", "numpy", "huggingface_hub")


def best_of_five(arguments: list[str]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("arguments", [["-c", "import phinetune"], ["-m", "phinetune", "--help"]])
def test_starting_is_quick(arguments: list[str]) -> None:
    seconds = best_of_five(arguments)
    print(f"\n{' '.join(arguments)}: {seconds:.3f} s")
    assert seconds < LIMIT_S


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from phinetune.cli.main import run
run(["--help"])
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
