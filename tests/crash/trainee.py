"""What is killed: a process that imports everything once and forks a child for each job it is told.

Reads jobs as JSON lines, kills the child with SIGKILL after `kill_after_s` (null: never), writes its exit
code. Jobs:
    {"kind": "save", "folder": ..., "size": floats per tensor, "step": the last one, "log": told each step}
    {"kind": "train", "project": ..., "run": ..., "resume": bool}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch
from transformers.models.phi3 import modeling_phi3

from phinetune.runs.train_run import train_run
from phinetune.training.checkpoint import Origin, prune, save_checkpoint

ORIGIN = Origin(settings_sha256="s", base_sha256="b", train_sha256="t", test_sha256="u")


# Imported late by those who use them; here once for all children.
PRELOADED = (matplotlib.figure, modeling_phi3)


def state_of(step: int, size: int) -> Any:
    """A state in which every number is the step: a mixture of two steps would show."""
    from phinetune.lora.attach import Adapter, LoraSettings
    from phinetune.lora.layers import LoraLinear
    from phinetune.training.state import TrainState

    width = max(1, size // 4)
    layer = LoraLinear(torch.nn.Linear(width, width, bias=False, device="meta"), rank=4, scaling=1.0)
    layer.lora_A = torch.nn.Parameter(torch.full((4, width), float(step)))
    layer.lora_B = torch.nn.Parameter(torch.full((width, 4), float(step)))
    adapter = Adapter({"layer": layer}, LoraSettings(rank=4))
    optimizer = torch.optim.AdamW(adapter.parameters())
    for weight in adapter.parameters():
        optimizer.state[weight] = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.full_like(weight, float(step)),
            "exp_avg_sq": torch.full_like(weight, float(step)),
        }
    return TrainState(adapter=adapter, optimizer=optimizer, step=step, num_tokens=step)


def save_forever(job: dict[str, Any]) -> None:
    """Checkpoints back to back, each told to the log after it is committed."""
    folder, step = Path(job["folder"]), int(job["step"])
    with Path(job["log"]).open("a", buffering=1) as log:
        while True:
            step += 1
            save_checkpoint(
                folder / f"step-{step:06d}", state_of(step, job["size"]), ORIGIN,
                base_name="none", metadata={}, versions={},
            )  # fmt: skip
            log.write(f"{step}\n")
            prune(folder, keep=2)


def train_once(job: dict[str, Any]) -> None:
    for _ in train_run(Path(job["project"]), run_name=job["run"], resume=job["resume"]):
        pass


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                {"save": save_forever, "train": train_once}[job["kind"]](job)
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(ended(child, job["kill_after_s"])), flush=True)


def ended(child: int, kill_after_s: float | None) -> int:
    """The status of the child once it is done, or killed at its moment; until then it keeps its pid."""
    if kill_after_s is not None:
        moment = time.monotonic() + kill_after_s
        while time.monotonic() < moment:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    main()
