"""Turn a tokenizer's JSON into a copy that cannot give a control token, whatever text it reads.

All added tokens go, flagged special or not, and so do their entries in the vocabulary: a word of the
vocabulary must not lead to the same id by another way. Knows nothing of templates.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Mapping
from typing import Any

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def is_plain_token(surface: str) -> bool:
    """Added tokens that are ordinary text: runs of white space, and the pieces of byte fallback."""
    return not surface.strip() or bool(_BYTE_PIECE.fullmatch(surface))


def control_tokens(spec: Mapping[str, Any], structural: frozenset[str]) -> dict[str, dict[str, Any]]:
    """The added tokens that are control tokens, by surface.

    The token for unknown characters is not one when text can really meet it, unless the model also uses it as
    one of the `structural` tokens (begin, end, padding).
    """
    unknown = _unknown_surface(spec["model"]) if _can_meet_unknown(spec) else None
    return {
        token["content"]: token
        for token in spec["added_tokens"]
        if not is_plain_token(token["content"])
        and (token["content"] != unknown or token["content"] in structural)
    }


def plain_spec(spec: Mapping[str, Any], control: Mapping[str, Any], *, is_start: bool) -> dict[str, Any]:
    """The JSON of the plain copy. `is_start` false: for text that follows a control token."""
    plain = copy.deepcopy(dict(spec))
    plain["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in control]
    plain["truncation"] = plain["padding"] = plain["post_processor"] = None
    if not is_start:
        _set_never_first(plain.get("pre_tokenizer"))
    ids = {token["id"] for token in control.values()}
    model = plain["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [
            [_unreachable(index), entry[1]] if index in ids else entry
            for index, entry in enumerate(model["vocab"])
        ]
    else:
        _rename(model, ids)
    return plain


def has_start_form(spec: Mapping[str, Any]) -> bool:
    """Whether the first word of a text is written otherwise than a word after a control token."""
    return _set_never_first(copy.deepcopy(spec.get("pre_tokenizer")))


def uses_byte_level(spec: Mapping[str, Any]) -> bool:
    """Whether the pieces are written in GPT-2's alphabet of bytes."""
    return any(entry.get("type") == "ByteLevel" for entry in _steps(spec.get("pre_tokenizer"))) or any(
        entry.get("type") == "ByteLevel" for entry in _steps(spec.get("decoder"))
    )


def _rename(model: dict[str, Any], ids: set[int]) -> None:
    names = {piece: _unreachable(index) for piece, index in model["vocab"].items() if index in ids}
    if not names:
        return
    model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]


def _touches(merge: str | list[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _unreachable(index: int) -> str:
    # Random for each load, so that no text can spell it.
    return f"\ue000{index}:{secrets.token_hex(16)}\ue001"


def _unknown_surface(model: Mapping[str, Any]) -> str | None:
    if isinstance(model["vocab"], list):
        index = model.get("unk_id")
        return None if index is None else str(model["vocab"][index][0])
    return model.get("unk_token")


def _can_meet_unknown(spec: Mapping[str, Any]) -> bool:
    return not (spec["model"].get("byte_fallback") or uses_byte_level(spec))


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("decoders")
    return [step for entry in inner for step in _steps(entry)] if inner else [part]


def _set_never_first(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Change every "prefix the first word" into "never"; whether there was one."""
    found = False
    for step in _steps(pre_tokenizer):
        if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"  # type: ignore[index]
            found = True
    return found
