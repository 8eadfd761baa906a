"""A bar for work that is counted, or a line now and then where nobody watches a bar."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

NUM_LINES = 5


class CountBar:
    """Use as a context; call `show(done, total)` as often as you like."""

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name
        self._num_lines = 0
        columns = (
            TextColumn(name),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, expand=True, transient=True)
        self._task = self._bar.add_task(name, total=1)

    def __enter__(self) -> CountBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """Say how far the work is."""
        if self._console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, completed=done, total=total)
        elif done * NUM_LINES >= (self._num_lines + 1) * total:
            self._num_lines = done * NUM_LINES // total
            self._console.print(f"{self._name}  {done}/{total}")
