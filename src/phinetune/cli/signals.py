"""Ctrl-C and SIGTERM while a run is going: the first asks it to end after its step, the second ends it.

Knows nothing of what a run does when it is asked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from phinetune.runs.stopping import StopRequest

WAITING = b"\nfinishing the step and saving; once more (Ctrl-C) stops at once\n"


class Signals:
    """What has arrived so far."""

    def __init__(self) -> None:
        self.last = signal.SIGINT

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.last


@contextlib.contextmanager
def asking(stop: StopRequest) -> Iterator[Signals]:
    """Within the block signals ask `stop`; raises `KeyboardInterrupt` where nobody would look at it."""
    received = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers; the default ones stay
        return

    def handle(number: int, frame: FrameType | None) -> None:
        received.last = signal.Signals(number)
        if stop.is_wanted or not stop.is_heard:
            raise KeyboardInterrupt
        stop.is_wanted = True
        # Not through Python's streams: the signal may have come in the midst of a print.
        with contextlib.suppress(OSError):
            os.write(2, WAITING)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
