"""The Windows API's `LanguageModel` in Python: the same names and steps, on any local model.

    Windows (C#)                              here
    LanguageModel.GetReadyState()             LanguageModel.get_ready_state()
    await LanguageModel.EnsureReadyAsync()    await LanguageModel.ensure_ready_async()
    await LanguageModel.CreateAsync()         await LanguageModel.create_async()
    model.CreateContext(system, filter)       model.create_context(system, filter_options)
    await model.GenerateResponseAsync(...)    await model.generate_response_async(...)
    operation.Progress += ...                 async for delta in model.generate_response_async(...)

What Windows leaves to the caller is done here: a seed makes answers repeatable, an adapter is checked
against the base before the first token. Knows nothing of HTTP or terminals.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from phinetune.base.errors import AdapterError, IncompatibleLowRankAdapter, ModelError, PhinetuneError
from phinetune.data.conversation import Message
from phinetune.generation.engine import Engine
from phinetune.generation.request import Request
from phinetune.generation.responder import Gate, Responder, Response
from phinetune.generation.sampling import Sampling
from phinetune.lora.forms import read_adapter
from phinetune.lora.weights import AdapterWeights
from phinetune.models.catalog import find_model, is_on_this_machine
from phinetune.models.loading import Base, load_base
from phinetune.safety.categories import Category, Policy, Severity
from phinetune.safety.content_filter import ContentFilter
from phinetune.text.render import Renderer, load_renderer

MAX_NEW_TOKENS = 1024


class AIFeatureReadyState(IntEnum):
    """Whether a model can answer; the values are those of Windows."""

    READY = 0
    NOT_READY = 1
    NOT_SUPPORTED_ON_CURRENT_SYSTEM = 2


class LanguageModelResponseStatus(IntEnum):
    """How an answer ended; the values are those of Windows."""

    COMPLETE = 0
    IN_PROGRESS = 1
    BLOCKED_BY_POLICY = 2
    PROMPT_LARGER_THAN_CONTEXT = 3
    PROMPT_BLOCKED_BY_CONTENT_MODERATION = 4
    RESPONSE_BLOCKED_BY_CONTENT_MODERATION = 5
    ERROR = 6
    INCOMPATIBLE_LOW_RANK_ADAPTER = 7


class SeverityLevel(IntEnum):
    """The gravest text that is let through, by Windows' names and values."""

    MINIMUM = 10
    LOW = 11
    MEDIUM = 12
    HIGH = 13

    @property
    def allowed(self) -> Severity:
        """On the scale of 0, 2, 4, 6: low lets 0-1 through, medium 0-3, high 0-5."""
        return {12: Severity.LOW, 13: Severity.MEDIUM}.get(int(self), Severity.SAFE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextContentFilterSeverity:
    """The gravest text that is let through in each category."""

    hate: SeverityLevel = SeverityLevel.MEDIUM
    sexual: SeverityLevel = SeverityLevel.MEDIUM
    violent: SeverityLevel = SeverityLevel.MEDIUM
    self_harm: SeverityLevel = SeverityLevel.MEDIUM

    def allowed(self) -> dict[Category, Severity]:
        levels = (self.hate, self.sexual, self.violent, self.self_harm)
        return {category: level.allowed for category, level in zip(Category, levels, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentFilterOptions:
    """What is kept back of prompts and of answers. Without such options everything passes."""

    prompt_max_allowed_severity_level: TextContentFilterSeverity = TextContentFilterSeverity()
    response_max_allowed_severity_level: TextContentFilterSeverity = TextContentFilterSeverity()

    def content_filter(self) -> ContentFilter:
        return ContentFilter(
            Policy(
                mode="block",
                prompt_max_severity=self.prompt_max_allowed_severity_level.allowed(),
                response_max_severity=self.response_max_allowed_severity_level.allowed(),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRankAdapter:
    """An adapter that was read; whether it fits a model is known when it is first used with it."""

    path: Path
    weights: AdapterWeights

    @staticmethod
    def create_from_path(path: str | Path, *, force_base: bool = False) -> LowRankAdapterResult:
        """Read an adapter: a `.safetensors` file, a PEFT directory, or another form that is known.

        A model whose weights are not those it was trained on ends as INCOMPATIBLE_LOW_RANK_ADAPTER;
        with `force_base` only where names or shapes do not fit.
        """
        try:
            weights = read_adapter(Path(path))
            weights = weights.for_any_base() if force_base else weights
        except PhinetuneError as error:
            return LowRankAdapterResult(low_rank_adapter=None, extended_error=error)
        return LowRankAdapterResult(low_rank_adapter=LowRankAdapter(path=Path(path), weights=weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankAdapterResult:
    """The adapter, or why there is none."""

    low_rank_adapter: LowRankAdapter | None
    extended_error: PhinetuneError | None = None


@dataclass(slots=True, kw_only=True)
class LanguageModelOptions:
    """How an answer is made; without a `seed` every call draws anew, as on Windows."""

    temperature: float = 0.9
    top_p: float = 0.9
    top_k: int = 40
    content_filter_options: ContentFilterOptions | None = None
    low_rank_adapter: LowRankAdapter | None = None
    seed: int | None = None
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(slots=True, kw_only=True, eq=False)
class LanguageModelContext:
    """A conversation: every complete answer adds its two turns."""

    messages: list[Message] = field(default_factory=list)
    content_filter_options: ContentFilterOptions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelResponseResult:
    """An answer, how it ended, and the error if it did not end well."""

    text: str
    status: LanguageModelResponseStatus
    extended_error: PhinetuneError | None = None


class ResponseOperation:
    """An answer under way: await it for the result, or iterate it for the pieces of text."""

    def __init__(
        self, response: Response | None, finished: Callable[[str, str], LanguageModelResponseResult]
    ) -> None:
        self._response, self._finished = response, finished
        self._result: LanguageModelResponseResult | None = None

    @classmethod
    def ended(cls, result: LanguageModelResponseResult) -> ResponseOperation:
        """An answer that never began."""
        operation = cls(None, lambda *_: result)
        operation._result = result
        return operation

    @property
    def status(self) -> LanguageModelResponseStatus:
        return self._result.status if self._result else LanguageModelResponseStatus.IN_PROGRESS

    def cancel(self) -> None:
        """End the answer; the result holds what has come so far."""
        if self._response:
            self._response.cancel()

    def __await__(self) -> Generator[Any, None, LanguageModelResponseResult]:
        return self._whole().__await__()

    async def __aiter__(self) -> AsyncIterator[str]:
        text = ""
        if self._response:
            async for piece in self._response:
                text += piece
                yield piece
            self._result = self._result or self._finished(text, self._response.reason)

    async def _whole(self) -> LanguageModelResponseResult:
        async for _ in self:
            pass
        assert self._result is not None
        return self._result


class LanguageModel:
    """A local model that answers, with any adapter per call; made by `create_async`.

    >>> async def main():
    ...     async with await LanguageModel.create_async("demo") as model:
    ...         result = await model.generate_response_async("Say hello", LanguageModelOptions(seed=1))
    ...         return result.status
    >>> import asyncio
    >>> asyncio.run(main()).name
    'COMPLETE'
    """

    def __init__(self, base: Base, renderer: Renderer) -> None:
        self._base, self._renderer = base, renderer
        self._responder = Responder(Engine(base), renderer)
        self._names: dict[LowRankAdapter, str] = {}
        self._numbers = itertools.count(1)

    @staticmethod
    def get_ready_state(model: str = "demo") -> AIFeatureReadyState:
        """READY when the model is on this machine; NOT_READY when it can be fetched."""
        if is_on_this_machine(model):
            return AIFeatureReadyState.READY
        is_hub_name = model.count("/") == 1 and not model.startswith((".", "/", "~"))
        ready = AIFeatureReadyState
        return ready.NOT_READY if is_hub_name else ready.NOT_SUPPORTED_ON_CURRENT_SYSTEM

    @staticmethod
    async def ensure_ready_async(
        model: str = "demo", *, on_progress: Callable[[float], None] | None = None
    ) -> None:
        """Fetch the model if it is not here; `on_progress` hears shares from 0 to 1. Raises `ModelError`."""
        if on_progress:
            on_progress(0.0)
        await asyncio.to_thread(find_model, model)
        if on_progress:
            on_progress(1.0)

    @classmethod
    async def create_async(
        cls, model: str = "demo", *, device: str = "auto", dtype: str = "auto"
    ) -> LanguageModel:
        """Load a model. Raises `ModelError` when it is not ready or cannot be loaded."""
        if cls.get_ready_state(model) is not AIFeatureReadyState.READY:
            raise ModelError(
                f"'{model}' is not on this machine", do="await LanguageModel.ensure_ready_async(...) first"
            )
        base = await asyncio.to_thread(load_base, model, device_name=device, dtype=dtype)
        return cls(base, load_renderer(base.folder))

    async def __aenter__(self) -> LanguageModel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Cancel what runs and let go of the model."""
        self._responder.close()

    def create_context(
        self, system: str | None = None, content_filter_options: ContentFilterOptions | None = None
    ) -> LanguageModelContext:
        """A conversation under a system message."""
        messages = [Message(role="system", content=system)] if system else []
        return LanguageModelContext(messages=messages, content_filter_options=content_filter_options)

    def get_usable_prompt_length(self, prompt: str, context: LanguageModelContext | None = None) -> int:
        """How much of a prompt fits, as an index into its UTF-8 bytes (as on Windows); all of it if it fits.

        Nothing is ever cut by itself: a longer prompt ends as PROMPT_LARGER_THAN_CONTEXT.
        """
        low, high = 0, len(prompt)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._ids(prompt[:middle], context)) <= self._max_prompt_tokens:
                low = middle
            else:
                high = middle - 1
        return len(prompt[:low].encode())

    def generate_response_async(
        self,
        prompt: str,
        options: LanguageModelOptions | None = None,
        *,
        context: LanguageModelContext | None = None,
    ) -> ResponseOperation:
        """Answer a prompt; the turn joins `context` when the answer is complete.

        Await the operation or iterate it. Failures are told by the result's status, never raised.
        """
        options = options or LanguageModelOptions()
        status = LanguageModelResponseStatus
        filter_options = options.content_filter_options or (context and context.content_filter_options)
        content_filter = filter_options.content_filter() if filter_options else None
        if content_filter and content_filter.prompt(prompt).is_blocked:
            return _ended(status.PROMPT_BLOCKED_BY_CONTENT_MODERATION)
        gate: Gate | None = content_filter.stream() if content_filter else None
        try:
            ids = self._ids(prompt, context)
            if len(ids) > self._max_prompt_tokens:
                return _ended(status.PROMPT_LARGER_THAN_CONTEXT, self._too_long(prompt, len(ids), context))
            request = Request(
                prompt=tuple(ids),
                max_new_tokens=options.max_new_tokens,
                adapter=self._adapter_name(options.low_rank_adapter),
                sampling=Sampling(
                    temperature=options.temperature,
                    top_p=options.top_p,
                    top_k=options.top_k,
                    seed=secrets.randbits(63) if options.seed is None else options.seed,
                ),
                stop_ids=self._renderer.stop_ids,
            )
            response = self._responder.respond(request, gate=gate)
        except IncompatibleLowRankAdapter as error:
            return _ended(status.INCOMPATIBLE_LOW_RANK_ADAPTER, error)
        except PhinetuneError as error:
            return _ended(status.ERROR, error)

        def finished(text: str, reason: str) -> LanguageModelResponseResult:
            if reason == "filtered":
                blocked = status.RESPONSE_BLOCKED_BY_CONTENT_MODERATION
                return LanguageModelResponseResult(text="", status=blocked)
            if response.is_failed:
                return LanguageModelResponseResult(
                    text=text, status=status.ERROR, extended_error=PhinetuneError(reason)
                )
            if context is not None:
                context.messages += [
                    Message(role="user", content=prompt),
                    Message(role="assistant", content=text),
                ]
            return LanguageModelResponseResult(text=text, status=status.COMPLETE)

        return ResponseOperation(response, finished)

    @property
    def _max_prompt_tokens(self) -> int:
        return self._base.max_length - 1

    def _ids(self, prompt: str, context: LanguageModelContext | None) -> list[int]:
        before = context.messages if context else []
        return self._renderer.prompt([*before, Message(role="user", content=prompt)])

    def _too_long(self, prompt: str, num_tokens: int, context: LanguageModelContext | None) -> PhinetuneError:
        usable = len(prompt.encode()[: self.get_usable_prompt_length(prompt, context)].decode())
        return PhinetuneError(
            "the prompt is larger than the context",
            why=f"with the conversation it has {num_tokens:,} tokens; {self._max_prompt_tokens:,} fit, "
            f"which is {usable:,} of the prompt's {len(prompt):,} characters",
            do="shorten the prompt, or begin a new context",
        )

    def _adapter_name(self, adapter: LowRankAdapter | None) -> str | None:
        """The engine's name of an adapter, loaded on first use."""
        if adapter is None:
            return None
        if adapter not in self._names:
            name = f"{adapter.path.name}#{next(self._numbers)}"
            self._responder.engine.load(name, adapter.weights)
            self._names[adapter] = name
        return self._names[adapter]


def _ended(status: LanguageModelResponseStatus, error: PhinetuneError | None = None) -> ResponseOperation:
    return ResponseOperation.ended(LanguageModelResponseResult(text="", status=status, extended_error=error))


# The names of the experimental API that Microsoft's first samples use.


@dataclass(slots=True, kw_only=True)
class LanguageModelOptionsExperimental(LanguageModelOptions):
    """`LanguageModelOptions` with the adapter under its first name."""

    lora_adapter: LowRankAdapter | None = None

    def __post_init__(self) -> None:
        self.low_rank_adapter = self.low_rank_adapter or self.lora_adapter


class LanguageModelExperimental:
    """`LanguageModel` by its first name: a model that loads adapters by path."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def load_adapter(self, path: str | Path) -> LowRankAdapter:
        """Raises `AdapterError` when it cannot be read."""
        result = LowRankAdapter.create_from_path(path)
        if result.low_rank_adapter is None:
            raise result.extended_error or AdapterError("the adapter cannot be read", where=str(path))
        return result.low_rank_adapter

    def generate_response_async(
        self, prompt: str, options: LanguageModelOptions | None = None
    ) -> ResponseOperation:
        return self._model.generate_response_async(prompt, options)


LowRankAdaptation = LowRankAdapter
