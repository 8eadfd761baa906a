"""Decide which examples can be scored and which can be answered, and say in words which cannot.

Knows nothing of adapters, losses or answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phinetune.base.errors import DataError
from phinetune.base.seeds import derive
from phinetune.data.conversation import Conversation, Example, Message
from phinetune.models.loading import Base
from phinetune.text.render import Rendered, Renderer

# An answer may be this much longer than the longest reference before it is stopped.
LENGTH_MARGIN, EXTRA_TOKENS = 1.25, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One example to be answered; `index` is its place among all examples."""

    index: int
    ids: list[int]
    messages: tuple[Message, ...]
    reference: str


def fitting_pieces(
    base: Base, rendered: Sequence[tuple[int, Rendered]], num_examples: int
) -> tuple[list[tuple[int, Rendered]], list[str]]:
    """What fits the model, as (index of the example, tokens), and a note about what does not.

    Raises `DataError` when nothing is left.
    """
    fitting = [(index, piece) for index, piece in rendered if piece.num_tokens <= base.max_length]
    num_too_long = len(rendered) - len(fitting)
    if not fitting:
        raise DataError(
            "there is nothing to compare on",
            where=f"{num_examples:,} examples",
            why="no example fits the model" if num_too_long else "the test set is empty",
            do=f"give examples of at most {base.max_length:,} tokens",
        )
    if not num_too_long:
        return fitting, []
    return fitting, [
        f"{num_too_long:,} of {len(rendered):,} examples are longer than the model's context of "
        f"{base.max_length:,} tokens and were not measured"
    ]


def answer_prompts(
    base: Base,
    renderer: Renderer,
    examples: Sequence[Example],
    *,
    system_prompt: str | None,
    max_answered: int | None,
    seed: int,
) -> tuple[list[Prompt], list[str]]:
    """The prompts to answer, at most `max_answered` chosen by the seed, and notes about the others."""
    asked = [
        (index, example)
        for index, example in enumerate(examples)
        if isinstance(example, Conversation) and any(turn.role == "assistant" for turn in example.messages)
    ]
    notes = []
    if max_answered is not None and max_answered < len(asked):
        notes.append(f"{max_answered:,} of {len(asked):,} conversations were answered, chosen by the seed")
        order = np.random.default_rng(derive(seed, "answered")).permutation(len(asked))
        asked = [asked[place] for place in sorted(order[:max_answered].tolist())]
    prompts, num_too_long = [], 0
    for index, example in asked:
        messages, reference = renderer.split(example)
        ids = renderer.prompt(messages, system_prompt=system_prompt)
        if len(ids) < base.max_length:
            prompts.append(Prompt(index=index, ids=ids, messages=messages, reference=reference))
        else:
            num_too_long += 1
    if num_too_long:
        notes.append(f"{num_too_long:,} prompts leave no room in the model's context and were not answered")
    return prompts, notes


def default_max_new_tokens(
    renderer: Renderer, prompts: Sequence[Prompt], choices: Sequence[str] | None = None
) -> int:
    """A quarter more than the longest reference or choice, plus 16."""
    longest = longest_tokens(renderer, [*(prompt.reference for prompt in prompts), *(choices or ())])
    return math.ceil(LENGTH_MARGIN * longest) + EXTRA_TOKENS


def longest_tokens(renderer: Renderer, texts: Sequence[str]) -> int:
    """The tokens of the longest text."""
    return max(len(renderer.tokenizer.encode_plain(text)) for text in texts)


def prompt_text(messages: Sequence[Message]) -> str:
    """A prompt to read: a lone user turn as it is, otherwise each turn under its role."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)
