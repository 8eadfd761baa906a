"""The small JSON files of a model folder that say how it speaks: template, special tokens, end ids.

Knows nothing of what the template does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phinetune.base.errors import ModelError

MAX_TEMPLATE_CHARS = 200_000
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json_object(path: Path, *, is_optional: bool = False) -> dict[str, Any]:
    """A JSON object; {} for a missing file when `is_optional`. Raises ModelError."""
    if is_optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        do = "take the file anew from where the model came from"
        raise ModelError(
            "a file of the model cannot be read", where=str(path), why=str(error), do=do
        ) from error
    if not isinstance(value, dict):
        raise ModelError("a file of the model is no JSON object", where=str(path), do="take it anew")
    return value


def special_surfaces(folder: Path) -> dict[str, str]:
    """The surfaces of `bos_token`, `eos_token` and so on, as far as the model names them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json_object(folder / name, is_optional=True)
        for key in SPECIAL_NAMES:
            value = content.get(key)
            surface = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(surface, str) and surface:
                found[key] = surface
    return found


def chat_template_text(folder: Path) -> str | None:
    """The model's Jinja chat template, or None. Raises ModelError for one beyond 200,000 characters."""
    path = folder / "chat_template.jinja"
    try:
        template = path.read_text("utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise ModelError("the chat template cannot be read", where=str(path), why=str(error)) from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if template is None:
            template = _default_of(read_json_object(folder / name, is_optional=True).get("chat_template"))
    if template is not None and len(template) > MAX_TEMPLATE_CHARS:
        why = f"{len(template):,} characters, {MAX_TEMPLATE_CHARS:,} are allowed"
        raise ModelError("the chat template is too large", where=str(folder), why=why)
    return template


def _default_of(template: object) -> str | None:
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template.strip() else None


def end_ids(folder: Path) -> frozenset[int]:
    """The ids at which the model's own files let generation end: a number or a list in either file."""
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = read_json_object(folder / name, is_optional=True).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        ids |= {entry for entry in values if isinstance(entry, int) and not isinstance(entry, bool)}
    return frozenset(ids)
