"""A tiny base, an adapter on it, and a renderer whose tokens are letters: enough to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phinetune.base.errors import DataError
from phinetune.data.conversation import Conversation, Example, Message, PlainText, Source
from phinetune.lora.attach import Adapter, LoraSettings, attach
from phinetune.models import attention
from phinetune.models.batch import PackedBatch
from phinetune.models.device import Compute
from phinetune.models.loading import Base
from phinetune.models.loss import trained_token_loss
from phinetune.text.render import Rendered

END, USER, ASSISTANT, SYSTEM = 0, 1, 2, 3
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}


class LetterRenderer:
    """One token per character after four control tokens."""

    stop_ids = frozenset({END})
    tokenizer = SimpleNamespace(encode_plain=lambda text: [ord(character) for character in text])

    def example(
        self, example: Example, *, system_prompt: str | None = None, loss_on: str = "assistant"
    ) -> Rendered:
        if isinstance(example, PlainText):
            ids, trained = [*map(ord, example.text), END], [True] * (len(example.text) + 1)
        else:
            ids, trained = [], []
            for message in self._with_system(example.messages, system_prompt):
                content = [*map(ord, message.content), END]
                ids += [ROLES[message.role], *content]
                trained += [False] + [message.role == "assistant" or loss_on == "all"] * len(content)
        trained[0] = False
        if not any(trained):
            raise DataError("no trained token", where=str(example.source))
        return Rendered(ids=np.array(ids, dtype=np.int32), trained=np.array(trained), source=example.source)

    def examples(self, examples: Sequence[Example], **options: Any) -> list[Rendered]:
        return [self.example(example, **options) for example in examples]

    def prompt(self, messages: Sequence[Message], *, system_prompt: str | None = None) -> list[int]:
        ids = []
        for message in self._with_system(messages, system_prompt):
            ids += [ROLES[message.role], *map(ord, message.content), END]
        return [*ids, ASSISTANT]

    def split(self, example: Conversation) -> tuple[tuple[Message, ...], str]:
        last = max(i for i, message in enumerate(example.messages) if message.role == "assistant")
        return example.messages[:last], example.messages[last].content

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in ids if token > SYSTEM)

    def _with_system(self, messages: Sequence[Message], system_prompt: str | None) -> Sequence[Message]:
        if system_prompt is None:
            return messages
        return [Message(role="system", content=system_prompt), *messages]


def letters_base(seed: int = 0) -> Base:
    torch.manual_seed(seed)
    config = Phi3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, pad_token_id=0, bos_token_id=1, eos_token_id=0,
        attn_implementation=attention.IMPLEMENTATION, initializer_range=0.1,
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval().requires_grad_(False)
    compute = Compute(device=torch.device("cpu"), dtype=torch.float32, reason="a test")
    return Base(
        name="letters", folder=Path("letters"), model=model, sha256="", compute=compute, num_parameters=0
    )


def attached(base: Base) -> Adapter:
    return attach(base.model, LoraSettings(rank=8, alpha=16.0), seed=0)


def train(base: Base, adapter: Adapter, examples: Sequence[Rendered], num_steps: int = 60) -> None:
    """A bare loop: enough for a tiny model to learn a few answers."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-2)
    batch = PackedBatch.lay(list(examples))
    for _ in range(num_steps):
        loss, num_trained = trained_token_loss(base, batch)
        (loss / num_trained).backward()
        optimizer.step()
        optimizer.zero_grad()


def turn(prompt: str, answer: str, line: int = 1) -> Conversation:
    return Conversation(
        messages=(Message(role="user", content=prompt), Message(role="assistant", content=answer)),
        source=Source(file="test.json", line=line),
    )


def text(content: str, line: int = 1) -> PlainText:
    return PlainText(text=content, source=Source(file="test.txt", line=line))
