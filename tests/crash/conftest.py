"""Processes to be killed, and the tiny project they train."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_project import project_maker, write_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


class Trainee:
    """Jobs in forked children of one process that has imported everything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "trainee.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, job: dict[str, Any], *, kill_after_s: float | None = None) -> tuple[int, float]:
        """The exit code of a job (-9 when the kill came in time) and the seconds it took."""
        assert self._process.stdin
        assert self._process.stdout
        began = time.perf_counter()
        self._process.stdin.write(json.dumps({**job, "kill_after_s": kill_after_s}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), time.perf_counter() - began

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="session")
def trainee() -> Iterator[Trainee]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    found = Trainee()
    yield found
    found.close()


@pytest.fixture
def moments() -> random.Random:
    """The moments of the kills; the same in every run of the tests, as far as a clock allows."""
    return random.Random(0)


@pytest.fixture
def new_project(tmp_path: Path) -> Callable[..., Path]:
    """A tiny project: two epochs of four steps, a checkpoint every second one, only losses compared."""
    model = write_model(tmp_path / "model", 0)
    make = project_maker((model, model), tmp_path)

    def small(**changes: Any) -> Path:
        values = {
            "num_training_steps": 8, "varied_seqlen": True, "gradient_accumulation_steps": 2,
            "lora_dropout": 0.2, "save_steps": 2, "compare_nsamples": 0, "early_stopping_patience": 9,
        }  # fmt: skip
        return make(**{**values, **changes})

    return small
