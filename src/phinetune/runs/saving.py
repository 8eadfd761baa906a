"""Write a run's checkpoints and its adapter, and wait for room when the disk is full.

Knows nothing of training beyond the state it is given.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from phinetune.base.errors import SpaceError
from phinetune.base.events import Event, EventLog, Paused, Saved
from phinetune.base.files import committed_dir
from phinetune.lora.attach import Adapter
from phinetune.lora.files import save_adapter
from phinetune.models.loading import Base
from phinetune.runs.folder import NUM_CHECKPOINTS_KEPT, RunFolder
from phinetune.runs.prepare import Prepared
from phinetune.runs.record import adapter_metadata, package_versions
from phinetune.runs.stopping import StopRequest
from phinetune.training.checkpoint import Origin, checkpoint_bytes, prune, save_checkpoint
from phinetune.training.state import TrainState

RETRY_S = 5.0
NUM_RETRIES_PER_REPORT = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Saver:
    """Everything that saving needs besides the state."""

    run: RunFolder
    prepared: Prepared
    base: Base
    origin: Origin
    log: EventLog
    stop: StopRequest
    num_processes: int

    def checkpoint(self, state: TrainState) -> Iterator[Event]:
        """A checkpoint of this step, and the best adapter so far beside it; at last `Saved`.

        Raises `SpaceError` only when the disk is full and the run is asked to stop.
        """
        folder = self.run.checkpoint(state.step)

        def write() -> None:
            # First the best: a process killed in between repeats the step, and with it this.
            if state.best_weights:
                now = state.adapter.snapshot()
                state.adapter.restore(state.best_weights)
                try:
                    self._write_adapter(self.run.best, state.adapter, state.best_step)
                finally:
                    state.adapter.restore(now)
            save_checkpoint(
                folder,
                state,
                self.origin,
                base_name=self.base.name,
                metadata=self._metadata(state.step),
                versions={**package_versions(), "processes": str(self.num_processes)},
            )

        yield from self._until_there_is_room(write, state.adapter)
        prune(self.run.checkpoints, keep=NUM_CHECKPOINTS_KEPT)
        yield Saved(step=state.step, path=str(folder))

    def adapter(self, adapter: Adapter, step: int) -> Iterator[Event]:
        """The result of the run."""
        yield from self._until_there_is_room(
            lambda: self._write_adapter(self.run.adapter, adapter, step), adapter
        )

    def _write_adapter(self, folder: Path, adapter: Adapter, step: int) -> None:
        with committed_dir(folder) as temporary:
            save_adapter(adapter, temporary, base_name=self.base.name, metadata=self._metadata(step))

    def _metadata(self, step: int) -> dict[str, str]:
        return adapter_metadata(
            self.base,
            self.prepared.settings,
            self.prepared.files,
            self.run.run_id,
            step,
            self.run.lineage(),
        )

    def _until_there_is_room(self, write: Callable[[], None], adapter: Adapter) -> Iterator[Event]:
        """Write; on a full disk give up the older checkpoints, then wait until others have made room."""
        num_retries = 0
        while True:
            try:
                self.log.sync()  # a checkpoint never knows of a step that the log has lost
                write()
                return
            except SpaceError:
                if prune(self.run.checkpoints, keep=1):
                    continue
                if self.stop.is_wanted:
                    raise
            if num_retries % NUM_RETRIES_PER_REPORT == 0:
                yield Paused(
                    what="the disk is full",
                    needed_bytes=checkpoint_bytes(adapter.num_stored),
                    free_bytes=shutil.disk_usage(self.run.path).free,
                )
            num_retries += 1
            time.sleep(RETRY_S)
