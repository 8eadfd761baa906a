"""Turn a stream of token ids into pieces of text that never end inside a character.

Knows nothing of models; the tokenizer comes in as a plain function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

REPLACEMENT = "\ufffd"


class TextStream:
    """Decode ids one at a time; text is held back until its last character is whole.

    The pieces joined are the text of all ids. Each piece is the growth of a short window's text, not the text
    of the new id alone, because many tokenizers decode a token differently at the start of a text.

    >>> stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    >>> [stream.push(byte) for byte in "a€".encode()]
    ['a', '', '', '€']
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        # How many ids of the window have been shown; the rest wait for their character to end.
        self._num_shown = 0

    def push(self, token: int) -> str:
        """The text that became certain with this id; often a word, sometimes nothing."""
        self._window.append(token)
        return self._grow(final=False)

    def finish(self) -> str:
        """What is still held back; a character that never became whole shows as U+FFFD."""
        return self._grow(final=True)

    def _grow(self, *, final: bool) -> str:
        shown = self._decode(self._window[: self._num_shown])
        text = self._decode(self._window)
        if not final and (text.endswith(REPLACEMENT) or len(text) <= len(shown)):
            return ""
        # The ids just shown stay as the left neighbour of the next ones.
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return text[len(shown) :]


def text_pieces(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """The non-empty pieces of text of a token stream."""
    stream = TextStream(decode)
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if piece := stream.finish():
        yield piece
