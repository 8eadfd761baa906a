"""How a run is asked to end at the next safe place. Knows nothing of signals or of who asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


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
