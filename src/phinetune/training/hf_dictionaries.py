"""Read `training_config` and `peft_config`, dictionaries for Hugging Face's Trainer and PEFT, as settings.

A key becomes a setting, or is listed as not needed with the reason, or is refused with its line: none
is passed over. Knows nothing of YAML.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from phinetune.base.errors import SettingsError, nearest
from phinetune.training.settings import TrainingSettings

DICTIONARIES = ("training_config", "peft_config")

_SAME = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed"),
    *("save_steps", "eval_steps", "eval_delay", "eval_accumulation_steps", "gradient_accumulation_steps"),
    "gradient_checkpointing",
)
_RENAMED: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in _SAME},
    "activation_checkpointing": ("gradient_checkpointing",),
    "num_train_epochs": ("epochs",),
    "per_device_train_batch_size": ("finetune_train_batch_size",),
    "per_device_eval_batch_size": ("finetune_test_batch_size",),
    "label_smoothing_factor": ("label_smoothing",),
    "max_length": ("finetune_train_seqlen", "finetune_test_seqlen"),
    "max_seq_length": ("finetune_train_seqlen", "finetune_test_seqlen"),
    "eval_strategy": ("evaluation_strategy",),
    "evaluation_strategy": ("evaluation_strategy",),
}
_LISTS = ("layers_to_transform", "layers_pattern", "modules_to_save")
_RENAMED_PEFT = {"r": ("lora_r",), "lora_alpha": ("lora_alpha",), "lora_dropout": ("lora_dropout",)}

# What their absence means to the Trainer, where our default is another.
_TRAINER_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 5e-5,
    "epochs": 3.0,
    "finetune_train_batch_size": 8,
    "finetune_test_batch_size": 8,
    "evaluation_strategy": "no",
    "save_steps": 500,
    "adam_beta2": 0.999,
}
_PEFT_DEFAULTS: Mapping[str, Any] = {"lora_r": 8, "lora_alpha": 8.0, "lora_dropout": 0.0}

_NOT_NEEDED: Mapping[str, str] = {
    "dataloader_num_workers": "the data is in memory",
    "dataset_text_field": "the fields of a row are known",
    "disable_tqdm": "the terminal decides",
    "do_train": "phinetune train does",
    "fp16": "float16 loses small gradients; see dtype",
    "greater_is_better": "the best checkpoint is the one of lowest test loss",
    "load_best_model_at_end": "the best checkpoint always is the result",
    "log_level": "all events are kept in events.jsonl",
    "logging_dir": "a run has its own folder",
    "logging_steps": "every step is recorded",
    "logging_strategy": "every step is recorded",
    "metric_for_best_model": "the best checkpoint is the one of lowest test loss",
    "output_dir": "a run has its own folder",
    "overwrite_output_dir": "a run never overwrites another one",
    "push_to_hub": "nothing is uploaded",
    "remove_unused_columns": "only the known fields of a row are read",
    "run_name": "see --run",
    "save_strategy": "checkpoints follow save_steps and evaluation_strategy",
    "save_total_limit": "the two newest checkpoints and the best are kept",
}
_OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")


@dataclass(kw_only=True)
class Translated:
    """Settings, the defaults of the other side, and the keys that nothing here needs, with reasons."""

    values: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    not_needed: dict[str, str] = field(default_factory=dict)


def translate(name: str, content: object, place: Callable[[str], str]) -> Translated:
    """The settings that one of `DICTIONARIES` stands for; `place(key)` says where a key is written.

    Raises `SettingsError` for a key that is unknown or a value that cannot be had here.

    >>> translate("peft_config", {"r": 8, "target_modules": "all-linear"}, str).values
    {'lora_r': 8, 'lora_target_modules': None}
    """
    if not isinstance(content, dict):
        raise SettingsError(f"{name} is not a dictionary", where=place(""), do='write {"key": value, …}')
    reader = _PeftReader(place) if name == "peft_config" else _TrainerReader(place)
    return reader.read({str(key): _none(value) for key, value in content.items()})


def _none(value: Any) -> Any:
    """Python's None, which YAML takes for a word."""
    return None if value == "None" else value


class _Reader:
    def __init__(self, place: Callable[[str], str]) -> None:
        self.place = place
        self.out = Translated()

    def refuse(self, key: str, value: Any, why: str, do: str) -> NoReturn:
        raise SettingsError(f"'{key}' cannot be {value!r} here", where=self.place(key), why=why, do=do)

    def rename(self, key: str, value: Any, names: Mapping[str, tuple[str, ...]]) -> bool:
        for setting in names.get(key, ()):
            self.out.values[setting] = value
        return key in names


class _TrainerReader(_Reader):
    """TrainingArguments of transformers, and a few of TRL's SFTConfig."""

    def read(self, content: Mapping[str, Any]) -> Translated:
        self.out.defaults = dict(_TRAINER_DEFAULTS)
        special: Mapping[str, Callable[[Any], None]] = {
            "max_steps": self._max_steps,
            "bf16": self._bf16,
            "do_eval": self._do_eval,
            "optim": self._optimizer,
            "packing": lambda value: self.out.values.update(varied_seqlen=not value),
            "report_to": self._report_to,
            "gradient_checkpointing_kwargs": self._checkpointing,
            "activation_checkpointing_kwargs": self._checkpointing,
        }
        schedule = {"lr_scheduler_type", "warmup_ratio", "warmup_steps"}
        for key, value in content.items():
            if key in special:
                special[key](value)
            elif key in _NOT_NEEDED:
                self.out.not_needed[key] = _NOT_NEEDED[key]
            elif key not in schedule and not self.rename(key, value, _RENAMED):
                self._unknown(key, {*_RENAMED, *special, *schedule, *_NOT_NEEDED})
        self._schedule(content)
        if "eval_strategy" in content or "evaluation_strategy" in content:
            self.out.values["evaluation_strategy"] = content.get("eval_strategy") or content.get(
                "evaluation_strategy"
            )
        return self.out

    def _schedule(self, content: Mapping[str, Any]) -> None:
        """The Trainer's schedules warm up by whatever it is told; ours say so in their names."""
        kind = content.get("lr_scheduler_type", "linear")
        if kind not in ("linear", "cosine"):
            self.refuse(
                "lr_scheduler_type", kind, "there are linear and cosine, with and without warm-up", "take one"
            )
        steps, ratio = content.get("warmup_steps") or 0, content.get("warmup_ratio") or 0
        if 0 < steps < 1:  # a share, in newer versions
            steps, ratio = 0, steps
        self.out.values["lr_scheduler_type"] = f"{kind}_with_warmup" if steps or ratio else kind
        if steps:
            self.out.values |= {"num_warmup_steps": steps, "warmup_ratio": None}
        elif ratio:
            self.out.values["warmup_ratio"] = ratio

    def _max_steps(self, value: Any) -> None:
        self.out.values["num_training_steps"] = None if value in (-1, None) else value

    def _bf16(self, value: Any) -> None:
        self.out.values["dtype"] = "bfloat16" if value else "float32"

    def _do_eval(self, value: Any) -> None:
        self.out.values["evaluation_strategy"] = "steps" if value else "no"

    def _optimizer(self, value: Any) -> None:
        found = next((name for name in _OPTIMIZERS if name in str(value)), "")
        if not found:
            self.refuse("optim", value, f"the optimizers are {', '.join(_OPTIMIZERS)}", "take one of them")
        self.out.values["optimizer"] = found
        if found == "sgd":
            self.out.values["sgd_momentum"] = 0.0  # as the Trainer makes it
        if "paged" in str(value) or "8bit" in str(value):
            self.out.not_needed["optim"] = f"{value}: what it keeps is small, and stays in float32"

    def _report_to(self, value: Any) -> None:
        if value == "all":
            self.refuse("report_to", value, "nothing is told unasked", "name the tools: [tensorboard]")
        names = [] if value in (None, "none") else [value] if isinstance(value, str) else value
        self.out.values["report_to"] = names

    def _checkpointing(self, value: Any) -> None:
        if value != {"use_reentrant": False}:
            self.out.not_needed["gradient_checkpointing_kwargs"] = "always the non-reentrant kind"

    def _unknown(self, key: str, known: set[str]) -> NoReturn:
        near = nearest(key, known)
        raise SettingsError(
            f"training_config has a key that has no counterpart: '{key}'",
            where=self.place(key),
            why=f"the nearest known one is '{near}'" if near else "it would be passed over",
            do=f"write '{near}', or remove it" if near else "remove it; docs/settings.md has all settings",
        )


class _PeftReader(_Reader):
    """LoraConfig of PEFT."""

    def read(self, content: Mapping[str, Any]) -> Translated:
        self.out.defaults = dict(_PEFT_DEFAULTS)
        fixed = {"task_type": "CAUSAL_LM", "peft_type": "LORA"}
        for key, value in content.items():
            if key == "target_modules":
                self._targets(value)
            elif key == "init_lora_weights":
                self.out.values[key] = "paper" if value is True else value
            elif self.rename(key, value, _RENAMED_PEFT):
                continue
            elif key in TrainingSettings.model_fields and value is not None:
                # PEFT takes one value where a list is meant.
                is_one = key in _LISTS and not isinstance(value, list)
                self.out.values[key] = [value] if is_one else value
            # PEFT's own word for "not used".
            elif value not in (None, False, fixed.get(key)) and value != [] and value != {}:
                why = f"only {fixed[key]!r} can be trained" if key in fixed else "there is no setting for it"
                self.refuse(key, value, why, "remove it from peft_config")
        return self.out

    def _targets(self, value: Any) -> None:
        if isinstance(value, str) and value != "all-linear":
            value = [value]
        self.out.values["lora_target_modules"] = None if value in (None, "all-linear") else value
