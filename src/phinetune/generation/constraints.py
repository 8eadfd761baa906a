"""Answers that must be JSON, JSON of a given schema, or one of given texts: which tokens may come next.

The grammar and its masks are llguidance's. Knows nothing of models or of other rows.

# V vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
import torch
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from phinetune.base.errors import UserError
from phinetune.text.tokenizer import TextTokenizer

# White space is allowed where JSON has it, but no model may go on with it for ever.
_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]{0,2}"}


class Constraint:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._bitmask = allocate_token_bitmask(1, vocab_size)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._matcher.is_stopped())

    def allow(self, logits_V: Tensor) -> Tensor:
        """The logits with every token that may not come next at minus infinity."""
        fill_next_token_bitmask(self._matcher, self._bitmask, 0)
        bits_V = np.unpackbits(self._bitmask.view(np.uint8)[0], bitorder="little")[: len(logits_V)]
        allowed_V = torch.from_numpy(bits_V.astype(bool)).to(logits_V.device)
        return logits_V.masked_fill(~allowed_V, -torch.inf)

    def accept(self, token: int) -> None:
        """Go on with a token that `allow` left. Raises `UserError` when the grammar is too large."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise UserError(
                "the grammar of the answer cannot be followed",
                why=self._matcher.get_error().splitlines()[0],
                do="use a simpler schema",
            )


class Grammar:
    """A form of answers for one model's tokenizer; `start` begins an answer."""

    def __init__(self, tokenizer: Any, grammar: str, vocab_size: int) -> None:
        self._tokenizer, self._grammar, self._vocab_size = tokenizer, grammar, vocab_size
        if fault := llguidance.LLMatcher.validate_grammar(grammar, tokenizer):
            raise UserError(
                "the schema cannot be used", why=fault.strip().splitlines()[0], do="correct the schema"
            )

    def start(self) -> Constraint:
        matcher = llguidance.LLMatcher(self._tokenizer, self._grammar, log_level=0)
        return Constraint(matcher, self._vocab_size)


class Grammars:
    """Makes grammars for a tokenizer; `vocab_size` is the number of logits, `stop_ids` end an answer."""

    def __init__(self, tokenizer: TextTokenizer, *, vocab_size: int, stop_ids: Collection[int]) -> None:
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, min(stop_ids))),
            n_vocab=vocab_size,
            eos_token=sorted(stop_ids),
        )

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def choice(self, answers: Sequence[str]) -> Grammar:
        """One of these texts, to the letter. Raises `UserError` for none, or for an empty one."""
        if not answers or not all(answers):
            raise UserError(
                "a choice needs answers to choose from", do="give texts of at least one character"
            )
        grammar = llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, answers)))
        return Grammar(self._tokenizer, grammar, self._vocab_size)

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that the schema accepts. Raises `UserError` for a schema that cannot be followed."""
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)
        return Grammar(self._tokenizer, grammar, self._vocab_size)


class _Vocabulary:
    """A tokenizer in the form that llguidance reads: the bytes of every id."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_id
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.control_ids.values())
        self.tokens = [
            tokenizer.token_bytes(id_) if id_ < tokenizer.vocab_size else b"" for id_ in range(vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode_plain(text if isinstance(text, str) else text.decode())
