"""From a loaded base with an adapter to the proof: train, save, go back when needed, compare.

Knows nothing of how the run folder came about, or of terminals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from phinetune.base.errors import DivergedError, LostProcessError, SpaceError
from phinetune.base.events import Event, EventLog, SaveDue, Stage, Stopped, Trained, Warned
from phinetune.evaluation.compare import Progress
from phinetune.lora.attach import Adapter
from phinetune.models.classifier import load_on
from phinetune.models.loading import Base
from phinetune.models.memory import release_unused
from phinetune.runs.folder import RunFolder
from phinetune.runs.pace import Pace
from phinetune.runs.prepare import Prepared
from phinetune.runs.processes import Processes
from phinetune.runs.proof import prove
from phinetune.runs.record import origin_of
from phinetune.runs.resume import bring_back
from phinetune.runs.saving import Saver
from phinetune.runs.stopping import StopRequest
from phinetune.training.checkpoint import Origin, load_checkpoint, newest_valid, steps_newest_first
from phinetune.training.distributed import Ranks
from phinetune.training.forecast import Forecast
from phinetune.training.loop import start, train
from phinetune.training.settings import TrainingSettings
from phinetune.training.state import TrainState

RETRY_RATE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Road:
    """From a loaded base with an adapter to the proof."""

    run: RunFolder
    prepared: Prepared
    base: Base
    adapter: Adapter
    expected: Forecast
    log: EventLog
    stop: StopRequest
    on_progress: Progress | None
    processes: Processes

    @property
    def ranks(self) -> Ranks:
        return self.processes.ranks

    def events(self, *, is_resumed: bool) -> Iterator[Event]:
        """Train, save, compare; the last event is `Finished` or `Stopped`."""
        settings, plan, base = self.prepared.settings, self.prepared.plan, self.base
        origin = origin_of(settings, base, self.prepared.files)
        saver = Saver(
            run=self.run,
            prepared=self.prepared,
            base=base,
            origin=origin,
            log=self.log,
            stop=self.stop,
            num_processes=self.ranks.size,
        )
        yield Stage(name="train", detail=f"{plan.num_steps} steps")
        state = start(base, self.adapter, settings)
        if self.run.lineage():
            state.first_weights = self.adapter.snapshot()
        if is_resumed:
            yield from bring_back(self.run, state, origin, num_processes=self.ranks.size)
        self.ranks.share_state(state)
        with self.stop.heard():
            trained = yield from self._trained(state, saver)
        if trained is None:
            return
        yield from saver.adapter(self.adapter, state.best_step)
        is_ending = self.ranks.any(self.stop.is_wanted)
        self.processes.release()
        if is_ending:
            yield Stopped(step=state.step, path=str(self.run.adapter))
            return
        # What counts is the adapter on disk: the proof is made with it, not with what is in memory.
        release_unused()
        self.adapter.detach(base.model)
        adapter = load_on(base, self.run.adapter)
        yield from prove(self.run, self.prepared, base, adapter, trained, self.expected, self.on_progress)

    def _trained(self, state: TrainState, saver: Saver) -> Generator[Event, None, Trained | None]:
        """Train to the end, or to where the run is asked to stop: then None."""
        settings = self.prepared.settings
        while True:
            try:
                return (yield from self._followed(state, saver))
            except DivergedError as error:
                if not may_retry(settings, state):
                    raise
                what = f"{error.what} ({error.where})"
            except LostProcessError:
                # The step it was lost in has changed nothing: what was trained before is whole.
                yield from self._saved(state, saver)
                raise
            yield from self._back_at_half_rate(state, saver.origin, what)
            self.ranks.share_state(state)

    def _followed(self, state: TrainState, saver: Saver) -> Generator[Event, None, Trained | None]:
        prepared = self.prepared
        rows = prepared.train.rendered, prepared.test.rendered
        pace = Pace(prepared.settings, prepared.plan, self.expected)
        for event in train(self.base, state, prepared.settings, prepared.plan, *rows, self.ranks):
            is_saving = isinstance(event, SaveDue)
            if is_saving:
                yield from self._saved(state, saver)
            else:
                yield event
            yield from pace.after(event)
            if isinstance(event, Trained):
                return event
            # The same answer in all processes, whichever was asked to end.
            if self.ranks.any(self.stop.is_wanted):
                if not is_saving:
                    yield from self._saved(state, saver)
                saved = steps_newest_first(self.run.checkpoints)
                yield Stopped(step=state.step, path=str(saved[0]) if saved else "")
                return None
        raise AssertionError("training ends with Trained")

    def _saved(self, state: TrainState, saver: Saver) -> Iterator[Event]:
        # The disk may be full for good only when the run is asked to stop meanwhile: what is saved stays.
        with contextlib.suppress(SpaceError):
            yield from saver.checkpoint(state)

    def _back_at_half_rate(self, state: TrainState, origin: Origin, what: str) -> Iterator[Event]:
        """To the last checkpoint, or to the start when there is none yet."""
        pick = newest_valid(self.run.checkpoints, origin)
        if pick.path:
            load_checkpoint(pick.path, state)
        else:
            state.begin_again(self.prepared.settings.seed)
        state.rate_factor = RETRY_RATE
        yield Warned(
            what=f"{what}; back to step {state.step}, and on at half the learning rate (retry_on_divergence)",
            propose=f"learning_rate: {RETRY_RATE * self.prepared.settings.learning_rate:g}",
        )


def may_retry(settings: TrainingSettings, state: TrainState) -> bool:
    """Whether a run that diverged goes back to its last checkpoint, at half the rate: once."""
    return settings.retry_on_divergence and state.rate_factor == 1
