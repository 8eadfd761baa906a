"""Named sets of settings for `phinetune new --preset`: what each differs in from the default.

Knows nothing of files. The base model and the data are never part of a preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phinetune.base.errors import SettingsError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Values that differ from the defaults, and where they come from."""

    meaning: str
    values: Mapping[str, Any]


PRESETS: Mapping[str, Preset] = {
    "default": Preset(meaning="Microsoft's published parameter list for Phi Silica.", values={}),
    "phi-silica": Preset(
        meaning="The Phi Silica template of the AI Toolkit.",
        values={
            "finetune_train_nsamples": 8000,
            "finetune_train_batch_size": 2,
            "finetune_train_seqlen": 1024,
            "lr_scheduler_type": "linear_with_warmup",
        },
    ),
    "aion": Preset(
        meaning="The Aion Instruct template of the AI Toolkit, which has no dropout.",
        values={
            "finetune_train_batch_size": 2,
            "finetune_train_seqlen": 1024,
            "lora_dropout": 0.0,
        },
    ),
    "phi-cookbook": Preset(
        meaning="training_config and peft_config of the PhiCookBook's fine-tuning sample for Phi-3-mini.",
        values={
            "finetune_train_batch_size": 4,
            "finetune_test_batch_size": 4,
            "epochs": 1.0,
            "save_steps": 100,
            "learning_rate": 5e-6,
            "lr_scheduler_type": "cosine_with_warmup",
            "warmup_ratio": 0.2,
            "seed": 0,
            "evaluation_strategy": "no",
            "lora_dropout": 0.05,
            "adam_beta2": 0.999,
            "gradient_checkpointing": True,
            "lora_r": 16,
            "lora_alpha": 32.0,
            "dtype": "bfloat16",
        },
    ),
}


def preset(name: str) -> Preset:
    """The preset of this name. Raises `SettingsError` with the nearest one.

    >>> preset("phi-silica").values["finetune_train_seqlen"]
    1024
    """
    if name not in PRESETS:
        near = nearest(name, PRESETS)
        raise SettingsError(
            f"there is no preset '{name}'",
            where=f"--preset {name}",
            why=f"the presets are: {', '.join(PRESETS)}",
            do=f"write '{near}'" if near else "choose one of them",
        )
    return PRESETS[name]
