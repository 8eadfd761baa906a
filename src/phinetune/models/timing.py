"""Time a short piece of work so that the figure holds for many like it. Knows nothing of the work."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

LONG_PROBE_S = 5.0
NUM_TIMED = 3


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has done it."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def timed(work: Callable[[], object], device: torch.device, agreed: Callable[[bool], bool] = bool) -> float:
    """Seconds of the fastest call after the first, which pays for set-up; of the first when that is long.

    `agreed` decides whether it was long: processes that must call `work` equally often agree there.
    """
    found: list[float] = []
    for _ in range(1 + NUM_TIMED):
        found.append(seconds_of(work, device))
        if agreed(sum(found) > LONG_PROBE_S):
            break
    return min(found[1:] or found)
