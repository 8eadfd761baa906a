"""Read and write `lora.yaml`: YAML 1.2, unknown keys refused with the nearest name, lines named.

Knows nothing of what the settings do.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from phinetune.base.errors import SettingsError, nearest
from phinetune.training.hf_dictionaries import DICTIONARIES, translate
from phinetune.training.settings import GROUPS, TrainingSettings, group_of

MAX_SIZE_BYTES = 1_000_000
_PYTHON_ASSIGNMENT = re.compile(rf"^({'|'.join(DICTIONARIES)})[ \t]*=[ \t]*(?={{)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsFile:
    """What a file says, and how some of it was understood."""

    settings: TrainingSettings
    notes: tuple[str, ...]


def load_settings(path: Path, overrides: Mapping[str, str] | None = None) -> TrainingSettings:
    """The settings of `read_settings`, without its notes."""
    return read_settings(path, overrides).settings


def read_settings(path: Path, overrides: Mapping[str, str] | None = None) -> SettingsFile:
    """The settings of a file, with `key=value` overrides in YAML's notation on top.

    `training_config` and `peft_config` may stand in it as they are in Python; they count before the
    single lines. Raises `SettingsError` naming file, line and key, with the nearest known name for an
    unknown one.
    """
    if not path.is_file():
        raise SettingsError(
            "there is no lora.yaml",
            where=str(path),
            do="name a project folder made by 'phinetune new', or make one",
        )
    if path.stat().st_size > MAX_SIZE_BYTES:
        raise SettingsError("lora.yaml is larger than 1 MB", where=str(path), do="keep only settings in it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(
            "lora.yaml is not text in UTF-8",
            where=str(path),
            why=f"byte {error.start} begins no character",
            do="save it as UTF-8",
        ) from None
    values, lines = _parse(_PYTHON_ASSIGNMENT.sub(r"\1: ", text), str(path))
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    notes = _take_dictionaries(values, places, str(path))
    for key, text in (overrides or {}).items():
        values[key] = _parse_value(key, text)
        places[key] = f"--set {key}={text}"
    return SettingsFile(settings=validated(values, places, str(path)), notes=notes)


def _take_dictionaries(values: dict[str, Any], places: dict[str, str], where: str) -> tuple[str, ...]:
    """Put the settings of the dictionaries in their place; what that changed, in words."""
    written = set(values) - set(DICTIONARIES)
    replaced, absent, not_needed = [], [], []
    for name in [name for name in DICTIONARIES if name in values]:

        def place(key: str, name: str = name) -> str:
            return f"{places.get(f'{name}.{key}') or places[name]}, {name}"

        found = translate(name, values.pop(name), place)
        for key, value in found.values.items():
            if key in written and _coerced(key, values[key]) != _coerced(key, value):
                replaced.append(f"{key} {_yaml_value(value)} (not {_yaml_value(values[key])})")
            values[key], places[key] = value, places[name]
        for key, value in found.defaults.items():
            if key not in values:
                values[key] = value
                absent.append(f"{key} {_yaml_value(value)}")
        not_needed += [f"{key} ({why})" for key, why in found.not_needed.items()]
    sayings = (
        ("the dictionaries count before single lines: ", replaced),
        ("not written, so as Hugging Face has it: ", absent),
        ("in the dictionaries, but not needed: ", not_needed),
    )
    return tuple(f"{where}: {saying}{', '.join(items)}" for saying, items in sayings if items)


def validated(values: Mapping[str, Any], places: Mapping[str, str], where: str) -> TrainingSettings:
    """`TrainingSettings` of plain values; `places` says where each key was written."""
    fields = TrainingSettings.model_fields
    for key in values:
        if key not in fields:
            near = nearest(key, fields)
            raise SettingsError(
                f"unknown setting '{key}'",
                where=places.get(key, where),
                why=f"the nearest known setting is '{near}'" if near else "no setting has a name like it",
                do=f"write '{near}', or remove the line" if near else "see docs/settings.md for all settings",
            )
    try:
        return TrainingSettings.model_validate({key: _coerced(key, value) for key, value in values.items()})
    except ValidationError as error:
        fault = error.errors()[0]
        key = str(fault["loc"][0]) if fault["loc"] else ""
        message = fault["msg"].removeprefix("Value error, ")
        if not key:
            conflict = message.split(" ", 1)[0]
            raise SettingsError(
                "two settings are in conflict", where=places.get(conflict, where), why=message
            ) from None
        raise SettingsError(
            f"'{key}' cannot be {json.dumps(values[key], default=str)}",
            where=places.get(key, where),
            why=message[0].lower() + message[1:],
            do=f"{fields[key].description} Default: {_yaml_value(fields[key].default)}",
        ) from None


def lora_yaml(settings: TrainingSettings) -> str:
    """The settings as a YAML file, every key under a comment that says what it means."""
    out = ["# Settings of this project. Every key may be changed; unknown keys are refused."]
    for group, title in GROUPS.items():
        out += ["", f"# {'-' * 4} {title} {'-' * (90 - len(title))}"]
        for name, field in TrainingSettings.model_fields.items():
            if group_of(name) == group:
                out += [f"# {field.description}", f"{name}: {_yaml_value(getattr(settings, name))}"]
    return "\n".join(out) + "\n"


def _coerced(key: str, value: Any) -> Any:
    """Strict checks, with the two liberties YAML users expect: 1 for 1.0, and a list for a tuple."""
    annotation = TrainingSettings.model_fields[key].annotation
    if annotation in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list) and "tuple" in str(annotation):
        return tuple(value)
    return value


def _yaml_value(value: Any) -> str:
    """One value as YAML 1.2; JSON is a subset of it."""
    if isinstance(value, float) and value == int(value) and abs(value) < 1e6:
        return f"{value:.1f}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _parse(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning

    if any(event == "alias" for event in _kinds(text)):
        raise SettingsError(
            "lora.yaml uses a YAML alias (*name)", where=where, do="write the value itself at each place"
        )
    yaml = YAML(typ="rt")
    yaml.version = (1, 2)  # 1e-4 is a number, `no` is a string
    try:
        with warnings.catch_warnings():
            # An anchor names a value for aliases, and there are none.
            warnings.simplefilter("ignore", ReusedAnchorWarning)
            loaded = yaml.load(StringIO(text))
    except DuplicateKeyError as error:
        raise SettingsError(
            "a setting is written twice", where=_marked(where, error), do="keep one of the two lines"
        ) from None
    except Exception as error:  # on text that is no YAML ruamel raises errors of many kinds
        problem = getattr(error, "problem", None) or "not readable as YAML"
        place = _marked(where, error) if isinstance(error, MarkedYAMLError) else where
        raise SettingsError(
            "lora.yaml is not valid YAML", where=place, why=str(problem), do="write one 'key: value' per line"
        ) from None
    if loaded is None:
        return {}, {}
    if not isinstance(loaded, dict):
        raise SettingsError(
            "lora.yaml does not hold settings", where=where, do="write one 'key: value' per line"
        )
    positions: Any = loaded.lc  # type: ignore[attr-defined]
    lines = {str(key): positions.key(key)[0] + 1 for key in loaded}
    for name in DICTIONARIES:
        inner: Any = loaded.get(name)
        if isinstance(inner, dict):
            lines |= {f"{name}.{key}": inner.lc.key(key)[0] + 1 for key in inner}  # type: ignore[attr-defined]
    return {str(key): _plain(value) for key, value in loaded.items()}, lines


def _kinds(text: str) -> list[str]:
    from ruamel.yaml import YAML
    from ruamel.yaml.events import AliasEvent

    try:
        return ["alias" for event in YAML().parse(StringIO(text)) if isinstance(event, AliasEvent)]
    except Exception:  # loading it says what is wrong
        return []


def _plain(value: Any) -> Any:
    """A ruamel value as the plain Python type strict checks expect."""
    if isinstance(value, bool) or value is None:
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return value


def _marked(where: str, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{where}:{mark.line + 1}" if mark else where


def _parse_value(key: str, text: str) -> Any:
    where = f"--set {key}={text}"
    values, _ = _parse(f"{key}: {text}", where)
    if list(values) != [key]:
        raise SettingsError(
            "--set takes one setting and its value",
            where=where,
            why=f"read as YAML this sets {', '.join(values) or 'nothing'}",
            do="put quotes around a text of several lines",
        )
    return values[key]
