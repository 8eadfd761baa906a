"""How a run is asked to end at the next safe place. Knows nothing of signals or of who asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phinetune.base.events import Event
    from phinetune.training.distributed import Ranks


class StopRequest:
    """`is_heard` says whether the run will look at `is_wanted` soon: between the steps of training."""

    def __init__(self) -> None:
        self.is_wanted = False
        self.is_heard = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Within the block the run looks at `is_wanted` after every step."""
        self.is_heard = True
        try:
            yield
        finally:
            self.is_heard = False


def agreed(events: Iterable[Event], ranks: Ranks, stop: StopRequest) -> Iterator[tuple[Event, bool]]:
    """Each event, and whether any process of the run is asked to end: the same answer in all of them."""
    for event in events:
        yield event, ranks.any(stop.is_wanted)
