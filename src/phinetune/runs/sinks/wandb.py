"""Weights & Biases: offline files in the run's folder, for `wandb sync`; online only when asked to.

Asked for by the environment variable `WANDB_MODE=online`, as W&B has it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from phinetune.runs.sinks.sink import Told


class WeightsAndBiases:
    """One W&B run of the same name and identity, in a project named like the project's folder."""

    def __init__(self, run: Told) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own reports of crashes
        import wandb

        self._run = wandb.init(
            project=run.project.name,
            name=run.run_id,
            id=run.run_id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            mode=os.environ.get("WANDB_MODE") or "offline",
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "succeeded" else 1)
