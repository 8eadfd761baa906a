"""A base model with any number of adapters, ready to answer: chats in, text out.

Knows nothing of runs, files of prompts or terminals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from phinetune.base.errors import AdapterError, UserError
from phinetune.base.seeds import derive
from phinetune.data.conversation import Message
from phinetune.generation.engine import Engine
from phinetune.generation.request import Request, Row
from phinetune.generation.sampling import GREEDY, Sampling
from phinetune.generation.scheduler import Limits
from phinetune.generation.stop_strings import StopStrings
from phinetune.generation.text_stream import text_pieces
from phinetune.lora.files import base_difference
from phinetune.lora.forms import read_adapter

if TYPE_CHECKING:
    from phinetune.generation.constraints import Grammar
    from phinetune.lora.attach import Adapter
    from phinetune.lora.weights import AdapterWeights
    from phinetune.models.loading import Base
    from phinetune.text.render import Renderer

DEFAULT_MAX_NEW_TOKENS = 512
# The adapter that a model was loaded with.
OWN = "adapter"
BASE = "base"


class Model:
    """A base, its adapters by name, and the renderer that belongs to both; made by `phinetune.load`.

    `system_prompt` replaces a chat's own system message; `data_system_prompt` is for chats without one.
    An adapter that cannot share a batch (DoRA) comes `attached`: such a model takes no others.
    """

    def __init__(
        self,
        name: str,
        base: Base,
        renderer: Renderer,
        *,
        attached: Adapter | None = None,
        system_prompt: str | None = None,
        data_system_prompt: str | None = None,
    ) -> None:
        self.name, self.base, self.renderer = name, base, renderer
        self.system_prompt, self.data_system_prompt = system_prompt, data_system_prompt
        self._attached = attached
        # Adapters that were forced on this base, and in words which other base they were trained on.
        self.forced: dict[str, str] = {}
        self.engine = Engine(base, Limits(max_waiting=1 << 20))

    @property
    def adapters(self) -> list[str]:
        """The names that `adapter=` takes; `adapter` is the model's own."""
        return [OWN] if self._attached else self.engine.adapters

    @property
    def has_own_adapter(self) -> bool:
        return OWN in self.adapters

    def load_adapter(self, name: str, adapter: Path | AdapterWeights, *, force_base: bool = False) -> None:
        """Add an adapter to choose from. Raises `AdapterError` when it does not fit the base.

        With `force_base` one that was trained on other weights of the same names and shapes is taken, and
        said in `forced`.
        """
        if name == BASE or (name == OWN and self.has_own_adapter):
            raise AdapterError(f"'{name}' is taken", where="adapter", do="choose another name")
        weights = read_adapter(adapter) if isinstance(adapter, Path) else adapter
        difference = base_difference(weights, self.base.sha256) if force_base else ""
        self.engine.load(name, weights.for_any_base() if force_base else weights)
        self.forced.pop(name, None)
        if difference:
            self.forced[name] = difference

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        with_adapter: bool = True,
        adapter: str | None = None,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        grammar: Grammar | None = None,
    ) -> Iterator[str]:
        """The answer to a text or a chat, in pieces that never end inside a character or a stop string.

        By the model's own adapter, by the one named, or by the base with `with_adapter=False`.
        """
        side = adapter or (OWN if with_adapter and self.has_own_adapter else BASE)
        request = self._request(prompt, side, sampling, max_new_tokens, grammar)
        stops = StopStrings(stop)
        with self._side(side):
            for piece in text_pieces(self.engine.follow(self.engine.submit(request)), self.renderer.decode):
                if shown := stops.push(piece):
                    yield shown
                if stops.is_found:
                    return
        if held := stops.finish():
            yield held

    def chat(
        self,
        prompt: str | Sequence[Message],
        *,
        with_adapter: bool = True,
        adapter: str | None = None,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        grammar: Grammar | None = None,
    ) -> str:
        """The whole answer; as `stream`."""
        pieces = self.stream(
            prompt,
            with_adapter=with_adapter,
            adapter=adapter,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop=stop,
            grammar=grammar,
        )
        return "".join(pieces)

    def answers(
        self,
        prompts: Sequence[str | Sequence[Message]],
        sides: Sequence[str],
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> dict[str, list[str]]:
        """The answers of every side, `base` or the name of an adapter, to every prompt, in one mixed batch.

        All sides draw with the same seed for the same prompt, so that they differ by their weights alone.
        """
        rows: dict[str, list[Row]] = {side: [] for side in sides}
        groups = [[side] for side in sides] if self._attached else [list(sides)]
        for group in groups:
            with self._side(group[0]):
                for index, prompt in enumerate(prompts):
                    own = replace(sampling, seed=derive(sampling.seed, "answer", index))
                    for side in group:
                        request = self._request(prompt, side, own, max_new_tokens, None)
                        rows[side].append(self.engine.submit(request))
                while not self.engine.is_idle:
                    self.engine.step()
        return {side: [self.renderer.decode(row.tokens) for row in rows[side]] for side in sides}

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """The tokens that the model sees before its answer."""
        return self.renderer.prompt(self.messages(prompt), system_prompt=self.system_prompt)

    def messages(self, prompt: str | Sequence[Message]) -> tuple[Message, ...]:
        """A text or a chat as turns, under the system message of the data where it has none."""
        messages = (Message(role="user", content=prompt),) if isinstance(prompt, str) else tuple(prompt)
        if self.data_system_prompt and messages[0].role != "system":
            messages = (Message(role="system", content=self.data_system_prompt), *messages)
        return messages

    def _request(
        self,
        prompt: str | Sequence[Message],
        side: str,
        sampling: Sampling,
        max_new_tokens: int,
        grammar: Grammar | None,
    ) -> Request:
        ids = self.prompt_ids(prompt)
        self._require_room(self.messages(prompt)[-1].content, len(ids))
        return Request(
            prompt=tuple(ids),
            max_new_tokens=max_new_tokens,
            adapter=None if side == BASE or self._attached else side,
            sampling=sampling,
            stop_ids=self.renderer.stop_ids,
            grammar=grammar,
        )

    def _require_room(self, last: str, num_ids: int) -> None:
        """Raise `UserError` when a prompt leaves no room for an answer, with how much of it could be used."""
        num_over = num_ids - (self.base.max_length - 1)
        if num_over <= 0:
            return
        tokenizer = self.renderer.tokenizer
        ids = tokenizer.encode_plain(last)
        usable = len(tokenizer.decode(ids[: max(0, len(ids) - num_over)]))
        raise UserError(
            f"the prompt has {num_ids:,} tokens, and the model's context holds {self.base.max_length:,} "
            "with the answer",
            why=f"{num_over:,} tokens are too many: of the last message's {len(last):,} characters, "
            f"{usable:,} could be used",
            do="shorten it; nothing is cut silently",
        )

    def _side(self, side: str) -> contextlib.AbstractContextManager[None]:
        """An attached adapter answers for every row, or for none."""
        is_off = self._attached is not None and side == BASE
        return self._attached.disabled() if self._attached and is_off else contextlib.nullcontext()
