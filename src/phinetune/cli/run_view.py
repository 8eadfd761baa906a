"""Show a run as it happens: consumes the events of a run, draws plan, progress and result.

Knows nothing of training: made-up events look the same. Progress goes to one console, results to another.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.status import Status
from rich.text import Text

from phinetune.base import events
from phinetune.cli import figures
from phinetune.cli.comparison_view import answers_view, comparison_table
from phinetune.cli.plan_view import plan_view, warnings_of
from phinetune.cli.progress import CountBar

# A line this often when nobody watches a bar: a tenth of the run, or this many seconds.
PLAIN_SHARE, PLAIN_SECONDS = 10, 30.0
NUM_ANSWERS_SHOWN = 3


class Declined(Exception):
    """The user read the plan and said no."""


class RunView:
    """Draws one run. `confirm` is asked once, after the plan; when it says no, `Declined` is raised."""

    def __init__(
        self,
        progress: Console,
        result: Console | None,
        *,
        confirm: Callable[[dict[str, Any]], bool] = lambda plan: True,
    ) -> None:
        self._progress, self._result, self._confirm = progress, result, confirm
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._waiting: Status | None = None
        self._counted: CountBar | None = None
        self._plain_step, self._plain_time = 0, 0.0
        self._rate = _Rate()
        self._test_loss: float | None = None
        self._name_of_step_0 = "base"
        self._warned: set[str] = set()
        self.summary: dict[str, Any] = {}
        self.saved_path = ""
        self.last_step = 0
        self.is_stopped = False

    def follow(self, run: Iterable[events.Event]) -> dict[str, Any]:
        """Show every event until the last; returns the content of summary.json."""
        try:
            for event in run:
                self.show(event)
        finally:
            self._stop_waiting()
            self._close_bar()
            if isinstance(run, Generator):
                run.close()  # a run that was declined or interrupted ends now, not at the next clean-up
        return self.summary

    def show(self, event: events.Event) -> None:
        """Show one event."""
        self._stop_waiting()
        match event:
            case events.Stage():
                self._stage(event)
            case events.Warned():
                self._warn(event.what, event.propose)
            case events.Noted():
                self._progress.print(Text(f"note     {event.what}", style="dim"))
            case events.Planned():
                self._planned(event)
            case events.Stepped():
                self._stepped(event)
            case events.Evaluated():
                self._evaluated(event)
            case events.Saved():
                self.saved_path = event.path
            case events.Resumed():
                self._resumed(event)
            case events.Paused():
                self._paused(event)
            case events.Stopped():
                self.is_stopped, self.saved_path = True, event.path
            case events.Reforecast():
                self._reforecast(event)
            case events.Trained():
                self._trained(event)
            case events.Compared():
                self._compared(event)
            case events.Finished():
                self.summary = event.summary

    def comparing(self, done: int, total: int) -> None:
        """How far the comparison is; it has no events of its own."""
        self._stop_waiting()
        if self._counted is None:
            self._counted = CountBar(self._progress, "compare")
        self._counted.show(done, total)

    def _stage(self, event: events.Stage) -> None:
        self._close_bar()
        line = Text(event.name, style="bold")
        if event.detail:
            line.append(f"  {event.detail}", style="not bold dim")
        self._progress.print(line)
        if self._progress.is_terminal and event.name != "train":
            self._waiting = self._progress.status(event.name, spinner="line")
            self._waiting.start()

    def _warn(self, what: str, propose: str) -> None:
        """Once per warning: the plan holds those that events have told already."""
        if what in self._warned:
            return
        self._warned.add(what)
        self._progress.print(Text("warning  ", style="yellow").append(what, style="default"))
        for line in propose.splitlines():
            self._progress.print(Text("propose  ", style="dim").append(line, style="not dim cyan"))

    def _planned(self, event: events.Planned) -> None:
        if event.plan.get("from_adapter"):
            self._name_of_step_0 = "start"
        self._progress.print(plan_view(event.plan))
        for what, propose in warnings_of(event.plan):
            self._warn(what, propose)
        if not self._confirm(event.plan):
            raise Declined

    def _stepped(self, event: events.Stepped) -> None:
        self.last_step = event.step
        self._rate.add(event)
        if not self._progress.is_terminal:
            self._plain_step_line(event)
            return
        if self._bar is None:
            self._bar = self._new_bar(event.num_steps)
        self._bar.update(self._task, completed=event.step, numbers=self._numbers(event))

    def _new_bar(self, num_steps: int) -> Progress:
        bar = Progress(
            TextColumn("train"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            console=self._progress,
            expand=True,
        )
        self._task = bar.add_task("train", total=num_steps, numbers="")
        bar.start()
        return bar

    def _plain_step_line(self, event: events.Stepped) -> None:
        """A line at the first and last step, at every tenth of the run, and at least twice a minute."""
        is_tenth = (event.step * PLAIN_SHARE // event.num_steps) > (
            self._plain_step * PLAIN_SHARE // event.num_steps
        )
        is_late = event.time - self._plain_time >= PLAIN_SECONDS
        if event.step == 1 or event.step == event.num_steps or is_tenth or is_late:
            self._plain_step, self._plain_time = event.step, event.time
            self._progress.print(f"step {event.step}/{event.num_steps}  {self._numbers(event)}")

    def _numbers(self, event: events.Stepped) -> str:
        parts = [f"loss {event.loss:.3f}"]
        if self._test_loss is not None:
            parts.append(f"test {self._test_loss:.3f}")
        rate = self._rate.tokens_per_second
        if rate:
            parts.append(f"{rate:,.0f} tok/s")
            left = (event.num_steps - event.step) * self._rate.seconds_per_step
            parts.append(f"{figures.duration_text(left)} left")
        return "  ".join(parts)

    def _evaluated(self, event: events.Evaluated) -> None:
        self._test_loss = event.loss
        name = self._name_of_step_0 if event.step == 0 else f"step {event.step}"
        line = Text(
            f"{name:<10}test loss {event.loss:.3f}  token accuracy {100 * event.token_accuracy:.1f} %  "
            f"({figures.duration_text(event.seconds)})"
        )
        if event.is_best and event.step:
            line.append("  best so far", style="green")
        self._progress.print(line)

    def _resumed(self, event: events.Resumed) -> None:
        self.last_step, self.saved_path = event.step, event.path
        place = f", from {event.path}" if event.path else ""
        self._progress.print(Text(f"resumed  after step {event.step}{place}"))

    def _paused(self, event: events.Paused) -> None:
        self._progress.print(
            Text("paused   ", style="yellow").append(
                f"{event.what}: {figures.size_text(event.needed_bytes)} needed, "
                f"{figures.size_text(event.free_bytes)} free; goes on by itself when there is room",
                style="default",
            )
        )

    def _reforecast(self, event: events.Reforecast) -> None:
        whole, left = (figures.duration_text(seconds) for seconds in (event.seconds, event.seconds_left))
        self._progress.print(f"forecast after {event.step} steps: about {whole} in all, {left} left")

    def _trained(self, event: events.Trained) -> None:
        self._close_bar()
        self._progress.print(
            f"trained {figures.count(event.num_steps, 'step')} in {figures.duration_text(event.seconds)}; "
            f"best step {event.best_step} ({event.stopped_because})"
        )

    def _compared(self, event: events.Compared) -> None:
        self._close_bar()
        if self._result is None:
            return
        self._result.print()
        self._result.print(comparison_table(event.evaluation))
        for view in answers_view(event.answers[:NUM_ANSWERS_SHOWN]):
            self._result.print(view)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._counted is not None:
            self._counted.stop()
            self._counted = None


class _Rate:
    """Speed over the last steps, so that a slow evaluation in between does not count."""

    def __init__(self, num_steps: int = 20) -> None:
        self._num_steps = num_steps
        self._seconds: list[float] = []
        self._tokens: list[int] = []

    def add(self, event: events.Stepped) -> None:
        self._seconds = [*self._seconds, event.seconds][-self._num_steps :]
        self._tokens = [*self._tokens, event.num_tokens][-self._num_steps :]

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(self._seconds)
        return sum(self._tokens) / seconds if seconds > 0 else 0.0

    @property
    def seconds_per_step(self) -> float:
        return sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
