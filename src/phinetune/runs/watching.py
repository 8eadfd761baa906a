"""Follow the events of a run that another process writes. Only reads; knows nothing of terminals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

from phinetune.base.events import Event, event_of, is_being_written
from phinetune.runs.folder import RunFolder

POLL_S = 0.3


def watch(run: RunFolder, wait: Callable[[], None] = lambda: time.sleep(POLL_S)) -> Iterator[Event]:
    """All events so far, then each as it is written, until no process writes the run any more.

    `wait` is called when there is nothing new. Events of kinds that are unknown here are left out.
    """
    if not run.events.is_file():
        return
    with run.events.open("rb") as file:
        rest = b""
        while True:
            # Asked first: what was written before the process ended is read below.
            is_live = is_being_written(run.events)
            *lines, rest = (rest + file.read()).split(b"\n")
            for line in lines:
                if event := event_of(json.loads(line)):
                    yield event
            if not is_live:
                return
            if not lines:
                wait()
