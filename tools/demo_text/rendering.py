"""Documents to token ids with the demo tokenizer; bit 15 marks an id that does not count in the loss.

The role tokens are followed by content ids directly: no newline ids after control tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from demo_text.document import Document

NO_LOSS = 0x8000
END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END = (
    "<|endoftext|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
CONTROL_TOKENS = (END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END)


class Renderer:
    """Encodes documents; content goes through the plain part alone, so text never becomes control ids."""

    def __init__(self, tokenizer_file: Path) -> None:
        self._whole = Tokenizer.from_file(str(tokenizer_file))
        self._plain = plain_part(self._whole)
        ids = {name: int(self._whole.token_to_id(name) or 0) for name in CONTROL_TOKENS}
        self.end_of_text: int = ids[END_OF_TEXT]
        self.end: int = ids[END]
        self.pad: int = ids[PAD]
        self.roles: dict[str, int] = {"system": ids[SYSTEM], "user": ids[USER], "assistant": ids[ASSISTANT]}

    @property
    def vocab_size(self) -> int:
        return int(self._whole.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Content ids alone."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._whole.decode(ids, skip_special_tokens=False))

    def render(self, documents: Iterable[Document]) -> Iterator[list[int]]:
        """Ids of each document, ending in `<|endoftext|>`."""
        stream = iter(documents)
        while batch := list(islice(stream, 2000)):
            texts = [turn.text for document in batch for turn in document]
            encoded = iter(self._plain.encode_batch_fast(texts, add_special_tokens=False))
            for document in batch:
                ids: list[int] = []
                for turn in document:
                    content = list(next(encoded).ids)
                    mark = 0 if turn.learn else NO_LOSS
                    if turn.role == "text":
                        ids += [i | mark for i in content]
                    else:
                        head = self.roles[turn.role]
                        ids += [head | mark, *(i | mark for i in content), self.end | mark]
                ids.append(self.end_of_text)
                yield ids


def plain_part(tokenizer: Tokenizer) -> Tokenizer:
    """The same byte-level BPE without any added token."""
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(spec))


def as_array(
    documents: Iterable[list[int]], limit: int | None = None
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """All ids end to end, and where each document starts; stops after `limit` ids."""
    ids: list[int] = []
    starts: list[int] = []
    for document in documents:
        starts.append(len(ids))
        ids += document
        if limit is not None and len(ids) >= limit:
            break
    return np.asarray(ids, dtype=np.uint16), np.asarray(starts, dtype=np.int64)
