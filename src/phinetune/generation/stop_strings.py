"""End a text at the first of some strings, though it comes in pieces. Knows nothing of tokens or models."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets pieces of a text through up to the first stop string, which is left out.

    The end of a piece that may yet become a stop string is held back until the next one tells.

    >>> stops = StopStrings(["END"])
    >>> [stops.push(piece) for piece in ("one EN", "ough END two")], stops.is_found
    (['one ', 'ENough '], True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_found = False

    def push(self, piece: str) -> str:
        """What became certain with this piece; nothing after a stop string was found."""
        if self.is_found:
            return ""
        text = self._held + piece
        first = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=-1)
        if first >= 0:
            self.is_found, self._held = True, ""
            return text[:first]
        num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What is still held back: the text ended before it became a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next(
        (size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0
    )
