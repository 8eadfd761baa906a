"""Chat templates written in Jinja, for models that have no template of our own.

The template is rendered twice: once with a mark in place of each message's content, once with the real
contents. When putting the contents into the first gives the second, the template passes contents through
untouched: its own text may hold control tokens, the contents may not. A template that rewrites contents
is used only where no content holds the surface of a control token. Knows nothing of ids.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from phinetune.base.errors import DataError
from phinetune.data.conversation import Message
from phinetune.text.pieces import Control, Piece, Text
from phinetune.text.sandbox import compile_template
from phinetune.text.tokenizer import ControlToken, TextTokenizer

# What a marked text depends on: each role, and each content that is blank (None: a mark stands for it).
_Outline = tuple[tuple[str, str | None], ...]
_Span = tuple[int, int]


class JinjaTemplate:
    """A model's own chat template. Raises ModelError when it is no Jinja."""

    name = "jinja"

    def __init__(
        self, source: str, tokenizer: TextTokenizer, variables: Mapping[str, Any] | None = None
    ) -> None:
        """`variables` are further ones that the template reads, beside the messages."""
        self._tokenizer = tokenizer
        self._nonce = _unused_nonce(source)
        self._render = compile_template(source, tokenizer.special, variables)
        if not self._shows_content():
            plain, self._render = (
                self._render,
                compile_template(source, tokenizer.special, variables, has_typed_content=True),
            )
            if not self._shows_content():
                self._render = plain
        self._mark = re.compile(f"\ue000{self._nonce}:(\\d+)\ue001")
        self._marked: Callable[[_Outline, bool], str] = lru_cache(maxsize=512)(self._render_marked)
        self.stop_surfaces = self._find_stop_surfaces()

    def _shows_content(self) -> bool:
        """Whether a user's text comes through; some templates want contents in parts of a type."""
        try:
            return self._mark_of(0) in self._render([("user", self._mark_of(0))], True)
        except DataError:
            return False

    def text(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """What the template writes for these messages. Raises DataError when it refuses them."""
        return self._render([(m.role, m.content) for m in messages], generation_prompt)

    def pieces(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[Piece]:
        """See `Template.pieces`."""
        outline = _outline(messages)
        marked = self._marked(outline, generation_prompt)
        self._require_all(messages, marked)
        spans = [self._turn_span(outline, marked, i) for i, m in enumerate(messages) if _is_trained(m)]
        real = self.text(messages, generation_prompt=generation_prompt)
        # Many templates trim contents: that is as good as having been given trimmed ones.
        for contents in ([m.content for m in messages], [m.content.strip() for m in messages]):
            if self._filled(marked, contents) == real:
                return self._passed_through(marked, contents, spans)
        return self._rewritten(messages, marked, real)

    def _mark_of(self, index: int) -> str:
        return f"\ue000{self._nonce}:{index}\ue001"

    def _render_marked(self, outline: _Outline, generation_prompt: bool) -> str:
        dialogue = [
            (role, self._mark_of(index) if blank is None else blank)
            for index, (role, blank) in enumerate(outline)
        ]
        return self._render(dialogue, generation_prompt)

    def _try_marked(self, outline: _Outline, *, generation_prompt: bool) -> str | None:
        try:
            return self._marked(outline, generation_prompt)
        except DataError:
            return None

    def _filled(self, marked: str, contents: Sequence[str]) -> str:
        return self._mark.sub(lambda match: contents[int(match[1])], marked)

    def _require_all(self, messages: Sequence[Message], marked: str) -> None:
        shown = [int(index) for index in self._mark.findall(marked)]
        for index, message in enumerate(messages):
            if message.content.strip() and index not in shown:
                raise DataError(
                    f"the model's chat template leaves out the {message.role} message",
                    why=f"message {index + 1} of {len(messages)} would not reach the model",
                    do="put its text into the first user message" if message.role == "system" else "",
                )
            if _is_trained(message) and shown.count(index) > 1:
                raise DataError("the model's chat template writes an assistant turn more than once")

    def _turn_span(self, outline: _Outline, marked: str, index: int) -> _Span:
        """Where, in the marked text, the assistant writes turn `index`: from its header to its end."""
        mark = self._mark_of(index)
        at = marked.find(mark)
        if at < 0:
            return 0, 0
        begin = at
        opening = self._try_marked(outline[:index], generation_prompt=True)
        if opening and marked.startswith(opening) and not self._mark.search(marked[len(opening) : at]):
            begin = min(at, len(opening))
        tail = marked[at + len(mark) :]
        # Only what the template writes after this turn alone belongs to it, not the next turn's header.
        closed = self._try_marked(outline[: index + 1], generation_prompt=False)
        if closed is not None and mark in closed:
            tail = _common_start(tail, closed[closed.rindex(mark) + len(mark) :])
        end = at + len(mark)
        return begin, end + self._length_to_first_control(tail)

    def _length_to_first_control(self, tail: str) -> int:
        length = 0
        for part in self._tokenizer.split_controls(tail):
            if isinstance(part, ControlToken):
                return length + len(part.surface)
            length += len(part)
        return 0

    def _passed_through(self, marked: str, contents: Sequence[str], spans: Sequence[_Span]) -> list[Piece]:
        pieces: list[Piece] = []
        end = 0
        for match in self._mark.finditer(marked):
            pieces += self._structure(marked, end, match.start(), spans)
            pieces.append(Text(contents[int(match[1])], _is_inside(match.start(), spans)))
            end = match.end()
        return pieces + self._structure(marked, end, len(marked), spans)

    def _structure(self, text: str, begin: int, end: int, spans: Sequence[_Span]) -> list[Piece]:
        """The template's own text between two positions, cut at control tokens and at the spans' borders."""
        pieces: list[Piece] = []
        for part in self._tokenizer.split_controls(text[begin:end]):
            if isinstance(part, ControlToken):
                pieces.append(Control(part.surface, _is_inside(begin, spans)))
                begin += len(part.surface)
                continue
            stop = begin + len(part)
            inner = {border for span in spans for border in span if begin < border < stop}
            borders = [begin, *sorted(inner), stop]
            for left, right in pairwise(borders):
                pieces.append(Text(text[left:right], _is_inside(left, spans)))
            begin = stop
        return pieces

    def _rewritten(self, messages: Sequence[Message], marked: str, real: str) -> list[Piece]:
        """For a template that rewrites contents: its string as it is, if no content can forge a border."""
        surfaces = self._tokenizer.control_surfaces
        forged = dict.fromkeys(surface for message in messages for surface in surfaces(message.content))
        if forged:
            raise DataError(
                f"the text holds {', '.join(forged)}",
                why="the model's chat template rewrites the text, which could then pass for a control token",
                do="take these letters out of the text",
            )
        if surfaces(real) != surfaces(marked):
            raise DataError(
                "the model's chat template makes control tokens out of the text",
                do="reword the message that the template rewrites",
            )
        trained = [index for index, message in enumerate(messages) if _is_trained(message)]
        spans = [self._rewritten_span(messages, marked, real, index) for index in trained]
        return self._structure(real, 0, len(real), spans)

    def _rewritten_span(self, messages: Sequence[Message], marked: str, real: str, index: int) -> _Span:
        opening = self.text(messages[:index], generation_prompt=True) if index else ""
        if not opening or not real.startswith(opening):
            raise DataError(
                "the model's chat template rewrites this conversation",
                why="which tokens the assistant wrote cannot be told",
                do="leave out what the template treats specially, often <think> … </think>",
            )
        _, end = self._turn_span(_outline(messages), marked, index)
        num_controls = len(self._tokenizer.control_surfaces(marked[:end]))
        return len(opening), self._end_of_control(real, num_controls)

    def _end_of_control(self, text: str, number: int) -> int:
        """The position after the control token with this 1-based number."""
        position = count = 0
        for part in self._tokenizer.split_controls(text):
            position += len(part.surface if isinstance(part, ControlToken) else part)
            count += isinstance(part, ControlToken)
            if count == number:
                return position
        return position

    def _find_stop_surfaces(self) -> tuple[str, ...]:
        outline: _Outline = (("user", None), ("assistant", None))
        marked = self._try_marked(outline, generation_prompt=False)
        if marked is None:
            return ()
        begin, end = self._turn_span(outline, marked, 1)
        last = self._tokenizer.split_controls(marked[begin:end])[-1:]
        return tuple(part.surface for part in last if isinstance(part, ControlToken))


def _outline(messages: Sequence[Message]) -> _Outline:
    return tuple((m.role, None if m.content.strip() else m.content) for m in messages)


def _is_trained(message: Message) -> bool:
    return message.role == "assistant" and message.weight == 1


def _is_inside(position: int, spans: Sequence[_Span]) -> bool:
    return any(begin <= position < end for begin, end in spans)


def _common_start(left: str, right: str) -> str:
    length = min(len(left), len(right))
    return left[: next((i for i in range(length) if left[i] != right[i]), length)]


def _unused_nonce(source: str) -> str:
    nonce = secrets.token_hex(8)
    return nonce if nonce not in source else _unused_nonce(source)
