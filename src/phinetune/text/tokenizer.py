"""A model's tokenizer in two forms: one that knows control tokens by name, one that cannot give them.

Text goes through the plain form only. Knows nothing of chats or templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from phinetune.base.errors import DataError, ModelError
from phinetune.base.files import sha256_file
from phinetune.text.model_files import end_ids, read_json_object, special_surfaces
from phinetune.text.plain import control_tokens, has_start_form, plain_spec, uses_byte_level

# What the `tokenizers` library takes away beside a stripping control token: Unicode's White_Space,
# which is not the set that str.strip() uses.
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token that structures text; `strips_left` and `strips_right` take the white space beside it away."""

    surface: str
    id: int
    strips_left: bool
    strips_right: bool


@dataclass(frozen=True, slots=True)
class EncodedText:
    """`ids` of one text; `positions[i]` is the index of the last character that `ids[i]` stands for."""

    ids: list[int]
    positions: list[int]


class TextTokenizer:
    """Made by `load_tokenizer`."""

    def __init__(self, spec: dict[str, Any], *, sha256: str, special: Mapping[str, str]) -> None:
        self.sha256 = sha256
        self.special = special
        structural = frozenset(surface for name, surface in special.items() if name != "unk_token")
        found = control_tokens(spec, structural)
        self.controls: Mapping[str, ControlToken] = {
            surface: ControlToken(surface, token["id"], bool(token["lstrip"]), bool(token["rstrip"]))
            for surface, token in found.items()
        }
        self.control_ids: Mapping[str, int] = {token.surface: token.id for token in self.controls.values()}
        self._control_id_set = frozenset(self.control_ids.values())
        self._full = Tokenizer.from_str(json.dumps({**spec, "truncation": None, "padding": None}))
        self._plain = Tokenizer.from_str(json.dumps(plain_spec(spec, found, is_start=True)))
        self._plain_after = self._plain
        if has_start_form(spec):
            self._plain_after = Tokenizer.from_str(json.dumps(plain_spec(spec, found, is_start=False)))
        self.vocab_size = 1 + max(self._full.get_vocab(with_added_tokens=True).values())
        self._is_byte_level = uses_byte_level(spec)
        # Longest first: where one surface begins another, the longer one is meant.
        surfaces = sorted(self.controls, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, surfaces)) or r"(?!)")

    def encode_plain(self, text: str) -> list[int]:
        """The ids of text; no control token among them, whatever the text says.

        Raises DataError for half a character (a lone surrogate) and for a character that the tokenizer has
        no id for and would replace by a control token.
        """
        return self.encode_many([text])[0].ids

    def encode_many(
        self, texts: Sequence[str], *, is_start: bool = True, with_positions: bool = False
    ) -> list[EncodedText]:
        """Many texts at once; `is_start` false when each follows a control token.

        `positions` is empty unless asked for. Raises DataError as `encode_plain`.
        """
        for text in texts:
            _require_whole_characters(text)
        plain = self._plain if is_start else self._plain_after
        encode = plain.encode_batch if with_positions else plain.encode_batch_fast
        results = []
        for text, encoding in zip(texts, encode(list(texts), add_special_tokens=False), strict=True):
            ids = encoding.ids
            if not self._control_id_set.isdisjoint(ids):
                raise _unknown_character(text)
            offsets = encoding.offsets if with_positions else ()
            results.append(EncodedText(ids, [max(begin, end - 1) for begin, end in offsets]))
        return results

    def split_controls(self, text: str) -> list[str | ControlToken]:
        """A template's own text cut at its control tokens. Never for text that people wrote."""
        parts: list[str | ControlToken] = []
        end = 0
        for match in self._control_pattern.finditer(text):
            parts += [text[end : match.start()], self.controls[match.group()]]
            end = match.end()
        return [part for part in (*parts, text[end:]) if part != ""]

    def control_surfaces(self, text: str) -> list[str]:
        """Every surface of a control token that text holds, in order."""
        return self._control_pattern.findall(text)

    def text_frame(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer itself puts before and after a text that is no chat."""
        ids = self._full.encode("", add_special_tokens=True).ids
        end = self.control_ids.get(self.special.get("eos_token", ""))
        num_before = ids.index(end) if end in ids else len(ids)
        if ids and ids[0] == end and self.special.get("bos_token") == self.special.get("eos_token"):
            num_before = 1
        return ids[:num_before], ids[num_before:]

    def decode(self, ids: Sequence[int], *, keep_control: bool = False) -> str:
        """The text of ids; control tokens are left out unless `keep_control`."""
        kept = [int(id_) for id_ in ids if keep_control or int(id_) not in self._control_id_set]
        return str(self._full.decode(kept, skip_special_tokens=False))

    def token(self, id_: int) -> str:
        """The piece of the vocabulary with this id, as the tokenizer spells it; "" for an unused id."""
        return self._full.id_to_token(int(id_)) or ""

    def is_control(self, id_: int) -> bool:
        """Whether an id belongs to a control token."""
        return id_ in self._control_id_set

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of UTF-8 that a token stands for; several tokens may share one character."""
        piece = self.token(id_)
        if id_ in self._control_id_set:
            return piece.encode()
        if self._is_byte_level and all(char in _BYTE_OF for char in piece):
            return bytes(_BYTE_OF[char] for char in piece)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Read `tokenizer.json` and the flags in `tokenizer_config.json` of a model folder. Raises ModelError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            "the model has no tokenizer.json",
            where=str(folder),
            do="load it once with transformers' AutoTokenizer and save it with save_pretrained",
        )
    spec = read_json_object(path)
    config = read_json_object(folder / "tokenizer_config.json", is_optional=True)
    try:
        special = special_surfaces(folder)
        spec["added_tokens"] = _added_tokens(spec, config, special, end_ids(folder))
        return TextTokenizer(spec, sha256=sha256_file(path), special=special)
    # The library raises plain Exception for a file that it cannot read.
    except Exception as error:
        if isinstance(error, ModelError):
            raise
        why = f"{type(error).__name__}: {error}"
        raise ModelError(
            "the tokenizer cannot be read", where=str(path), why=why, do="take it anew"
        ) from error


def _added_tokens(
    spec: Mapping[str, Any], config: Mapping[str, Any], special: Mapping[str, str], ends: frozenset[int]
) -> list[dict[str, Any]]:
    """The added tokens with the flags of `tokenizer_config.json`, which transformers lets win.

    A special token or an end token that stands in the vocabulary only is an added token too.
    """
    tokens = {token["content"]: dict(token) for token in spec.get("added_tokens") or []}
    declared = config.get("added_tokens_decoder") or {}
    for index, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        known = tokens.get(entry["content"])
        if known is not None and known["id"] != int(index):
            raise ModelError(
                "two ids for one control token",
                why=f"{entry['content']} is {known['id']} in tokenizer.json and {index} in its config",
                do="take both files from the same version of the model",
            )
        tokens[entry["content"]] = {**_NO_FLAGS, **entry, "id": int(index)}
    vocab = spec["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    for piece, index in pairs:
        if piece not in tokens and (index in ends or piece in special.values()):
            tokens[piece] = {**_NO_FLAGS, "content": piece, "id": index, "special": True}
    return sorted(tokens.values(), key=lambda token: int(token["id"]))


_NO_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def _require_whole_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "the text holds half a character",
            why=f"\\u{ord(text[error.start]):04x} at position {error.start + 1} is a lone surrogate",
            do="write the text anew; it was cut inside a character",
        ) from None


def _unknown_character(text: str) -> DataError:
    return DataError(
        "the model's tokenizer has no token for a character of this text",
        why=f"it would put a control token in its place, in: {text[:60]!r}",
        do="take the character out, or use another model",
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
