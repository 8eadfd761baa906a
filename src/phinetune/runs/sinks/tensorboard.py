"""TensorBoard: event files in the run's folder. To look: `tensorboard --logdir PROJECT/runs`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from phinetune.runs.sinks.sink import Told

FLUSH_S = 5


class TensorBoard:
    """Writes through torch's own writer."""

    def __init__(self, run: Told) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if run.resumed_after is None else run.resumed_after + 1
        self._writer = SummaryWriter(
            log_dir=str(run.folder / "tensorboard"), purge_step=purge_step, flush_secs=FLUSH_S
        )
        text = json.dumps(dict(run.settings), indent=1, ensure_ascii=False)
        # Four blanks make a code block of Markdown.
        self._writer.add_text("settings", "\n".join(f"    {line}" for line in text.splitlines()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        self._writer.add_text("status", status)
        self._writer.close()
