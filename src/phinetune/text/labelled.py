"""Examples with a class: what the model reads of each, and the number of its class.

A chat that ends with a user's turn is read up to the assistant's header, where an answer would begin; a text
as the tokenizer writes it. The class is read off the last token. Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phinetune.data.conversation import Conversation, Example
from phinetune.text.render import Rendered, Renderer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labelled(Rendered):
    """One example and the number of its class; `trained` marks the last token, which tells the class."""

    class_number: int


def read_ids(renderer: Renderer, example: Example, system_prompt: str | None = None) -> list[int]:
    """The tokens that a classifier reads of one example. Raises DataError."""
    if isinstance(example, Conversation):
        asks = example.messages[-1].role != "assistant"
        return renderer.prompt(example.messages, system_prompt=system_prompt, generation_prompt=asks)
    before, after = renderer.tokenizer.text_frame()
    return [*before, *renderer.tokenizer.encode_plain(example.text), *after]


def render_labelled(
    renderer: Renderer, examples: Sequence[Example], names: Sequence[str], *, system_prompt: str | None
) -> list[Labelled]:
    """All examples in order; every label must be one of the names."""
    numbers = {name: number for number, name in enumerate(names)}
    return [
        labelled(read_ids(renderer, example, system_prompt), example, numbers[example.label])
        for example in examples
        if example.label is not None
    ]


def labelled(ids: Sequence[int], example: Example, class_number: int) -> Labelled:
    """Tokens with a class, told by the last of them."""
    trained = np.zeros(len(ids), dtype=np.bool_)
    trained[-1:] = True
    return Labelled(
        ids=np.array(ids, np.int32), trained=trained, source=example.source, class_number=class_number
    )
