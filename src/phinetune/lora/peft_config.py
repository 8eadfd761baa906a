"""What a PEFT config says, as settings; what it says and this project cannot honour is an error.

Knows nothing of tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from phinetune.base.errors import AdapterError
from phinetune.lora.settings import Bias, LoraSettings

# Options of PEFT that change what the weights mean; each must be off, or the file is refused.
_UNSUPPORTED = {
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Ways of starting that change the weights of the base, which are not in the adapter's file.
_CHANGING_STARTS = ("corda", "loftq", "lora_ga", "olora", "pissa")


# What other values of these keys would be read as is anyone's guess: `"false"` is true in Python.
_TYPES: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "bias": (str,),
    "fan_in_fan_out": (bool,),
    "init_lora_weights": (bool, str),
    "target_modules": (list, str),
    "use_dora": (bool,),
    "use_rslora": (bool,),
}
# No config has a thousandth of it; what is larger is something else under its name.
MAX_CONFIG_BYTES = 16_000_000


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config file, checked to be one."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")  # reading a pipe or a device may never end
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        config = parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            "this folder holds no adapter",
            where=str(path.parent),
            why=f"{path.name} is missing",
            do="name a run folder, its adapter/ folder, or another PEFT directory",
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(
            "the adapter's config cannot be read",
            where=str(path),
            why=str(error),
            do="copy the whole adapter folder again",
        ) from None
    return config


def parsed(text: str) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for anything else."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def settings_of(config: Mapping[str, Any], where: Path) -> LoraSettings:
    """What a PEFT config says, or an `AdapterError` where it says what cannot be honoured."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"the adapter is of type {config.get('peft_type')!r}",
            where=str(where),
            do="use a LoRA adapter (peft_type LORA)",
        )
    for key, off in _UNSUPPORTED.items():
        if key in config and config[key] != off and config[key]:
            raise AdapterError(
                f"the adapter uses '{key}', which is not supported",
                where=str(where),
                why=f"it is {json.dumps(config[key])}; ignoring it would give wrong answers",
                do="convert it to a plain LoRA adapter with the library that made it",
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING_STARTS):
        raise AdapterError(
            f"the adapter was started with '{start}', which is not supported",
            where=str(where),
            why="that way of starting changes the base's weights, so the file alone is not the whole adapter",
            do="convert it to a plain LoRA adapter with the library that made it",
        )
    try:
        _check_types(config)
        return _settings(config)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise AdapterError(
            "the adapter's config lacks a usable value",
            where=str(where),
            why=f"{type(error).__name__}: {error}",
            do="copy the whole adapter folder again",
        ) from None


def _check_types(config: Mapping[str, Any]) -> None:
    for key, types in _TYPES.items():
        value = config.get(key)
        if value is not None and not isinstance(value, types):
            raise TypeError(f"{key} is {value!r}")
    for key, value in {"r": config["r"], **(config.get("rank_pattern") or {})}.items():
        # Metadata of a single file holds texts.
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise TypeError(f"{key} is {value!r}, not a whole number")
    for key, value in {"lora_alpha": config["lora_alpha"], **(config.get("alpha_pattern") or {})}.items():
        if isinstance(value, bool):
            raise TypeError(f"{key} is {value!r}, not a number")


def _settings(config: Mapping[str, Any]) -> LoraSettings:
    targets = config.get("target_modules")
    settings = LoraSettings(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        target_modules=tuple(sorted(targets)) if isinstance(targets, list) else None,
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        rank_pattern={_key(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()},
        alpha_pattern={_key(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        layers_to_transform=tuple(int(number) for number in _listed(config, "layers_to_transform")) or None,
        layers_pattern=tuple(str(name) for name in _listed(config, "layers_pattern")),
        bias=_bias(config.get("bias") or "none"),
        modules_to_save=tuple(str(name) for name in _listed(config, "modules_to_save")),
        trainable_token_indices=_token_indices(config.get("trainable_token_indices")),
    )
    ranks = [settings.rank, *settings.rank_pattern.values()]
    alphas = [settings.alpha, *settings.alpha_pattern.values()]
    if min(ranks) < 1 or not all(map(math.isfinite, alphas)) or not 0 <= settings.dropout < 1:
        raise ValueError(f"r {ranks}, alpha {alphas}, dropout {settings.dropout}")
    return settings


def _bias(word: object) -> Bias:
    if word not in get_args(Bias):
        raise ValueError(f"bias {word!r}")
    return cast(Bias, word)


def _token_indices(value: Any) -> tuple[int, ...]:
    """PEFT takes a list for the token embedding, or lists by the name of the layer."""
    if isinstance(value, dict):
        if len(value) > 1:
            raise ValueError(
                f"trainable_token_indices names {len(value)} layers; only the embedding's are read"
            )
        value = next(iter(value.values()), None)
    return tuple(int(index) for index in value or ())


def _listed(config: Mapping[str, Any], key: str) -> list[Any]:
    """PEFT takes one value or a list of them, or nothing."""
    value = config.get(key)
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _key(key: str) -> str:
    """A key of a pattern. PEFT takes regular expressions; names cover their use and cannot hang a program."""
    name = key.replace("\\.", ".").removesuffix("$")
    if not name.removeprefix("^").replace(".", "").replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"'{key}' in a pattern is a regular expression; write the names of the layers")
    return name
