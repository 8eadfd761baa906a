"""Tell the tools named by `report_to` what happens in a run, and never let one of them end it.

Knows nothing of training; every value comes from an event.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phinetune.base.errors import SettingsError
from phinetune.base.events import Event, Finished, Resumed, Stopped, Warned
from phinetune.runs.sinks.mlflow import Mlflow
from phinetune.runs.sinks.sink import Sink, Told
from phinetune.runs.sinks.tensorboard import TensorBoard
from phinetune.runs.sinks.trackio import Trackio
from phinetune.runs.sinks.values import values_of
from phinetune.runs.sinks.wandb import WeightsAndBiases
from phinetune.training.settings import SinkName

OPENERS: dict[SinkName, Callable[[Told], Sink]] = {
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def require_installed(names: Sequence[SinkName]) -> None:
    """Raise `SettingsError`, with what to install, when a tool of `report_to` is not there."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"report_to names {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not installed",
            where="report_to",
            do=f"pip install {' '.join(missing)}; or take the name out of report_to",
        )


class Reporter:
    """Opens each tool at the first number of the run; one that fails is left out, with a warning."""

    def __init__(self, names: Sequence[SinkName], folder: Path, settings: Mapping[str, Any]) -> None:
        self._waiting = list(dict.fromkeys(names))
        self._told = Told(folder=folder, settings=settings)
        self._open: dict[SinkName, Sink] = {}
        self._step = 0

    def reported(self, events: Iterator[Event]) -> Iterator[Event]:
        """The same events, told to the tools before they are passed on; and warnings where one fails."""
        try:
            for event in events:
                yield from self._tell(event)
                yield event
        except (KeyboardInterrupt, GeneratorExit):
            list(self._close("interrupted"))
            raise
        finally:
            list(self._close("failed"))

    def _tell(self, event: Event) -> Iterator[Warned]:
        if isinstance(event, Resumed):
            self._told = replace(self._told, resumed_after=event.step)
        elif isinstance(event, Finished | Stopped):
            yield from self._close("succeeded" if isinstance(event, Finished) else "interrupted")
        elif values := values_of(event):
            self._step = getattr(event, "step", self._step)
            yield from self._open_waiting()
            for name, sink in list(self._open.items()):
                if fault := _fault_of(lambda sink=sink: sink.log(self._step, values)):  # type: ignore[misc]
                    del self._open[name]
                    yield _left_out(name, fault)

    def _open_waiting(self) -> Iterator[Warned]:
        while self._waiting:
            name = self._waiting.pop(0)

            def open_it(name: SinkName = name) -> None:
                self._open[name] = OPENERS[name](self._told)

            if fault := _fault_of(open_it):
                yield _left_out(name, fault)

    def _close(self, status: str) -> Iterator[Warned]:
        while self._open:
            name, sink = self._open.popitem()
            if fault := _fault_of(lambda sink=sink: sink.close(status)):  # type: ignore[misc]
                yield _left_out(name, fault)


def _fault_of(work: Callable[[], None]) -> str:
    """Do it; what went wrong, or "". Whatever another tool raises, the run must go on."""
    try:
        # Standard output is for results: some of these tools print on it.
        with contextlib.redirect_stdout(sys.stderr):
            work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _left_out(name: SinkName, fault: str) -> Warned:
    return Warned(
        what=f"{name} fails and is told no more; the run goes on ({fault.splitlines()[0]})",
        propose="report_to without it, or see what is wrong with it",
    )
