"""A trained classifier, ready to answer: texts or chats in, names of classes with their probability out.

Knows nothing of runs or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phinetune.base.errors import DataError
from phinetune.data.conversation import Conversation, Example, Message, PlainText, Source
from phinetune.evaluation.classify import predict
from phinetune.models.loading import Base
from phinetune.text.labelled import labelled, read_ids
from phinetune.text.render import Renderer


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """The likeliest class of one input, its probability, and that of every class by name."""

    label: str
    probability: float
    probabilities: dict[str, float]


class TextClassifier:
    """A base with a trained head and adapter; made by `phinetune.load_classifier`."""

    def __init__(self, base: Base, renderer: Renderer, *, system_prompt: str | None) -> None:
        self.base, self.renderer = base, renderer
        self._system_prompt = system_prompt

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, in the order of the head's rows."""
        assert self.base.classifier is not None
        return self.base.classifier.names

    def classify(self, inputs: Sequence[str | Sequence[Message]]) -> list[Classified]:
        """The class of each text or chat; a bare text is a user's turn where chats were trained.

        Raises `DataError` for an empty input or one that is longer than the model's context.
        """
        rows = []
        for number, given in enumerate(inputs, start=1):
            example = self._example(given, Source(file="input", line=number))
            source = example.source
            row = labelled(read_ids(self.renderer, example, self._system_prompt), example, 0)
            if row.num_tokens > self.base.max_length:
                raise DataError(
                    "a text is longer than the model's context",
                    where=str(source),
                    why=f"it has {row.num_tokens:,} tokens, the model {self.base.max_length:,} positions",
                    do="shorten it",
                )
            rows.append(row)
        return [self._classified(log_p_C) for log_p_C in predict(self.base, rows).log_p_NC] if rows else []

    def _example(self, given: str | Sequence[Message], source: Source) -> Example:
        if not given or (isinstance(given, str) and not given.strip()):
            raise DataError("there is nothing to classify", where=str(source), do="give some text")
        if not isinstance(given, str):
            return Conversation(messages=tuple(given), source=source)
        assert self.base.classifier is not None
        if self.base.classifier.reads_chats:
            return Conversation(messages=(Message(role="user", content=given),), source=source)
        return PlainText(text=given, source=source)

    def _classified(self, log_p_C: np.ndarray) -> Classified:
        p_C = np.exp(log_p_C)
        best = int(p_C.argmax())
        return Classified(
            label=self.names[best],
            probability=float(p_C[best]),
            probabilities={name: float(p) for name, p in zip(self.names, p_C, strict=True)},
        )
