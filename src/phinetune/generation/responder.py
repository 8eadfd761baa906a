"""Text in, text out: one engine on a thread of its own, answers as streams of text.

A stream never ends inside a character, never shows a stop string, and never shows what the content filter
keeps back. Any number of threads and tasks may ask; all share the engine's steps.
Knows nothing of HTTP, terminals or where adapters come from.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from phinetune.generation.engine import Engine
from phinetune.generation.request import Request, Row, State
from phinetune.generation.sampling import Choice
from phinetune.generation.stop_strings import StopStrings
from phinetune.generation.text_stream import TextStream

if TYPE_CHECKING:
    from phinetune.text.render import Renderer


class Gate(Protocol):
    """What stands between an answer and its reader: a content filter's stream."""

    def push(self, piece: str) -> str: ...

    def finish(self) -> str: ...

    @property
    def is_closed(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How many tokens a request took."""

    num_prompt_tokens: int
    num_new_tokens: int


class Response:
    """One answer on its way; made by `Responder.respond`.

    Iterate it for pieces of text (`for` or `async for`), or take the whole `text()`. `reason` is set at the
    end: stop, length, cancelled, deadline, filtered, or the words of a failure.
    """

    def __init__(self, responder: Responder, row: Row, stops: Sequence[str], gate: Gate | None) -> None:
        self._responder, self.row = responder, row
        self._stream = TextStream(responder.renderer.decode)
        self._stops = StopStrings(stops)
        self.gate = gate
        self._num_read = 0
        self._pieces: list[str] = []
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self.reason = ""

    @property
    def is_over(self) -> bool:
        return bool(self.reason)

    @property
    def is_failed(self) -> bool:
        return self.row.state is State.FAILED

    @property
    def choices(self) -> list[Choice]:
        """The chosen tokens with their log-probabilities, when those were asked for."""
        return list(self.row.choices)

    @property
    def usage(self) -> Usage:
        return Usage(num_prompt_tokens=len(self.row.request.prompt), num_new_tokens=len(self.row.tokens))

    def cancel(self) -> None:
        """End the answer; what has come so far stays."""
        self._responder.engine.cancel(self.row)
        self.advance()

    def text(self) -> str:
        """The whole answer, once it is there."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_over)
            return "".join(self._pieces)

    def __iter__(self) -> Iterator[str]:
        num_given = 0
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self.is_over or len(self._pieces) > num_given)  # noqa: B023
                    pieces, is_over = self._pieces[num_given:], self.is_over
                num_given += len(pieces)
                yield from pieces
                if is_over:
                    return
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listen() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.append(listen)
        num_given = 0
        try:
            while True:
                changed.clear()
                with self._changed:
                    pieces, is_over = self._pieces[num_given:], self.is_over
                num_given += len(pieces)
                for piece in pieces:
                    yield piece
                if is_over:
                    return
                if not pieces:
                    await changed.wait()
        finally:
            with self._changed:
                self._listeners.remove(listen)
            self.cancel()

    def advance(self) -> None:
        """Read the row's new tokens; called after each step that concerned it."""
        with self._changed:
            if self.is_over:
                return
            is_row_over = self.row.is_over  # asked first: no token comes after
            tokens = self.row.tokens[self._num_read :]
            self._num_read += len(tokens)
            shown = "".join(self._passed(self._stream.push(token)) for token in tokens)
            if is_row_over and not self._is_cut:
                shown += self._passed(self._stream.finish()) + self._ended()
            if shown:
                self._pieces.append(shown)
            if is_row_over or self._is_cut:
                if self._stops.is_found and self.gate and not self.gate.is_closed:
                    self._append(self.gate.finish())
                self.reason = self._reason()
            listeners = list(self._listeners)
            self._changed.notify_all()
        if self._is_cut:
            self._responder.engine.cancel(self.row)
        for listen in listeners:
            listen()

    @property
    def _is_cut(self) -> bool:
        return self._stops.is_found or bool(self.gate and self.gate.is_closed)

    def _passed(self, piece: str) -> str:
        if not piece or self._is_cut:
            return ""
        piece = self._stops.push(piece)
        return self.gate.push(piece) if self.gate else piece

    def _ended(self) -> str:
        """What the stop strings and the gate still hold when the row has ended by itself."""
        if self._is_cut:
            return ""
        held = self._stops.finish()
        if not self.gate:
            return held
        shown = self.gate.push(held)
        return shown if self.gate.is_closed else shown + self.gate.finish()

    def _append(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)

    def _reason(self) -> str:
        if self.gate and self.gate.is_closed:
            return "filtered"
        return "stop" if self._stops.is_found else self.row.reason


class Responder:
    """An engine that works by itself while anybody waits for an answer. Close it to stop the thread."""

    def __init__(self, engine: Engine, renderer: Renderer) -> None:
        self.engine, self.renderer = engine, renderer
        self._responses: dict[int, Response] = {}
        self._wanted = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="phinetune-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Responder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def respond(self, request: Request, *, stop: Sequence[str] = (), gate: Gate | None = None) -> Response:
        """Begin an answer. Raises what `Engine.submit` raises."""
        with self._wanted:
            row = self.engine.submit(request)
            response = Response(self, row, stop, gate)
            self._responses[row.number] = response
            self._wanted.notify()
        if row.is_over:
            response.advance()
        return response

    def close(self) -> None:
        """Cancel what runs, end the thread, and give the model its own layers back."""
        with self._wanted:
            self._is_closed = True
            self._wanted.notify()
        self._thread.join()
        self.engine.close()
        for response in list(self._responses.values()):
            response.advance()

    def _work(self) -> None:
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._is_closed or not self.engine.is_idle)
                if self._is_closed:
                    return
            try:
                rows = self.engine.step()
            except Exception:
                # The engine has failed the rows of the step, with the words; the others go on.
                rows = []
            concerned = {row.number for row in rows}
            for number, response in list(self._responses.items()):
                if number in concerned or response.row.is_over:
                    response.advance()
                if response.is_over:
                    del self._responses[number]
