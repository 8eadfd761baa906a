"""Presets are what their sources say, and the dictionaries of the PhiCookBook work as they are pasted."""

from __future__ import annotations

import ast

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from phinetune.base.errors import SettingsError
from phinetune.training.hf_dictionaries import translate
from phinetune.training.lora_yaml import lora_yaml, read_settings
from phinetune.training.presets import PRESETS, preset
from phinetune.training.settings import TrainingSettings

PASTED = """\
training_config = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs":{"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
    }

peft_config = {
    "r": 16,  # the rank
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}
"""


def read(tmp_path, text, overrides=None):
    path = tmp_path / "lora.yaml"
    path.write_text(text, encoding="utf-8")
    return read_settings(path, overrides)


def refused(tmp_path, text):
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text)
    return caught.value


def test_the_pasted_dictionaries_are_the_preset(tmp_path):
    found = read(tmp_path, PASTED)
    assert found.settings == TrainingSettings(**PRESETS["phi-cookbook"].values)
    (defaults, not_needed) = found.notes
    assert "not written, so as Hugging Face has it: adam_beta2 0.999" in defaults
    for key in ("log_level", "logging_steps", "logging_strategy", "output_dir", "overwrite_output_dir",
                "remove_unused_columns", "save_total_limit"):  # fmt: skip
        assert f"{key} (" in not_needed


def test_every_pasted_key_is_mapped_or_said(tmp_path):
    """Each key on its own: taking it out changes the settings or the notes, or it says what is so anyway."""
    whole = read(tmp_path, PASTED)
    silent = set()
    for line in PASTED.splitlines():
        key = line.strip().split('"')[1] if line.strip().startswith('"') else ""
        if not key:
            continue
        less = read(tmp_path, PASTED.replace(line, ""))
        if (less.settings, less.notes) == (whole.settings, whole.notes):
            silent.add(key)
    # These say what the Trainer, PEFT or phinetune do without them too.
    assert silent == {
        "max_steps", "gradient_accumulation_steps", "gradient_checkpointing_kwargs", "bias",
        "task_type", "target_modules", "modules_to_save",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_the_dictionaries_mean_what_they_mean_to_hugging_face(tmp_path):
    """The Trainer's and PEFT's own classes, given the same dictionaries, hold the same values."""
    found = read(tmp_path, PASTED).settings
    training, peft = (ast.literal_eval(text.split(" = ", 1)[1].strip()) for text in PASTED.split("\n\n"))
    # Gone or renamed in newer versions; bfloat16 is asked of the machine.
    for key in ("overwrite_output_dir", "warmup_ratio", "bf16"):
        training.pop(key)
    training["output_dir"] = str(tmp_path)
    theirs = TrainingArguments(**training, use_cpu=True)
    for ours, their in (
        ("learning_rate", "learning_rate"), ("epochs", "num_train_epochs"), ("save_steps", "save_steps"),
        ("finetune_train_batch_size", "per_device_train_batch_size"), ("adam_beta2", "adam_beta2"),
        ("finetune_test_batch_size", "per_device_eval_batch_size"), ("weight_decay", "weight_decay"),
        ("adam_beta1", "adam_beta1"), ("adam_epsilon", "adam_epsilon"), ("max_grad_norm", "max_grad_norm"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"), ("seed", "seed"),
        ("gradient_checkpointing", "gradient_checkpointing"), ("label_smoothing", "label_smoothing_factor"),
    ):  # fmt: skip
        assert getattr(found, ours) == getattr(theirs, their), ours
    config = LoraConfig(**peft)
    assert (found.lora_r, found.lora_alpha, found.lora_dropout) == (
        config.r,
        config.lora_alpha,
        config.lora_dropout,
    )


def test_absent_keys_are_hugging_faces_defaults(tmp_path):
    found = read(tmp_path, "training_config = {}\npeft_config = {}\n").settings
    theirs, config = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), LoraConfig()
    assert found.learning_rate == theirs.learning_rate
    assert found.epochs == theirs.num_train_epochs
    assert found.finetune_train_batch_size == theirs.per_device_train_batch_size
    assert found.finetune_test_batch_size == theirs.per_device_eval_batch_size
    assert found.evaluation_strategy == theirs.eval_strategy.value
    assert found.save_steps == theirs.save_steps
    assert found.lr_scheduler_type == theirs.lr_scheduler_type.value
    assert (found.adam_beta1, found.adam_beta2) == (theirs.adam_beta1, theirs.adam_beta2)
    assert (found.lora_r, found.lora_alpha, found.lora_dropout) == (
        config.r,
        config.lora_alpha,
        config.lora_dropout,
    )


def test_dictionaries_pasted_below_a_whole_file_count_and_what_they_replace_is_said(tmp_path):
    found = read(tmp_path, lora_yaml(TrainingSettings(seed=7)) + PASTED)
    assert found.settings.learning_rate == 5e-6
    assert found.settings.adam_beta2 == 0.95  # written in the file; the dictionary does not say
    (replaced,) = [note for note in found.notes if "count before single lines" in note]
    assert "learning_rate 5e-06 (not 0.0002)" in replaced
    assert "seed 0 (not 7)" in replaced
    assert "lora_r" not in replaced  # the same in both
    assert read(tmp_path, PASTED, {"seed": "9", "lora_r": "4"}).settings.seed == 9


@pytest.mark.parametrize("text", ["training_config: {seed: 3}\n", "training_config:\n  seed: 3\n",
                                  "training_config={'seed': 3}\n"])  # fmt: skip
def test_yamls_own_forms_of_a_dictionary_work_too(tmp_path, text):
    assert read(tmp_path, text).settings.seed == 3


@pytest.mark.parametrize(
    ("pair", "setting", "value"),
    [
        ("'warmup_steps': 30", "num_warmup_steps", 30),
        ("'warmup_steps': 30", "lr_scheduler_type", "linear_with_warmup"),
        ("'warmup_steps': 0.1", "warmup_ratio", 0.1),
        ("'warmup_steps': 30, 'warmup_ratio': 0.5", "warmup_ratio", None),
        ("'lr_scheduler_type': 'cosine'", "lr_scheduler_type", "cosine"),
        ("'max_steps': 40", "num_training_steps", 40),
        ("'bf16': False", "dtype", "float32"),
        ("'do_eval': True", "evaluation_strategy", "steps"),
        ("'do_eval': True, 'eval_strategy': 'epoch'", "evaluation_strategy", "epoch"),
        ("'optim': 'adamw_torch_fused'", "optimizer", "adamw"),
        ("'optim': 'paged_adamw_32bit'", "optimizer", "adamw"),
        ("'optim': 'adafactor'", "optimizer", "adafactor"),
        ("'optim': 'lion_32bit'", "optimizer", "lion"),
        ("'optim': 'sgd'", "sgd_momentum", 0.0),
        ("'packing': False", "varied_seqlen", True),
        ("'packing': True", "varied_seqlen", False),
        ("'max_length': 512", "finetune_train_seqlen", 512),
        ("'max_seq_length': 512", "finetune_test_seqlen", 512),
        ("'label_smoothing_factor': 0.1", "label_smoothing", 0.1),
        ("'report_to': 'none'", "report_to", ()),
        ("'report_to': ['wandb']", "report_to", ("wandb",)),
        ("'report_to': 'tensorboard'", "report_to", ("tensorboard",)),
    ],
)  # fmt: skip
def test_a_key_of_the_trainer_becomes_the_setting_that_does_the_same(tmp_path, pair, setting, value):
    text = f"save_steps: 64\ntraining_config = {{{pair}}}\n"
    assert getattr(read(tmp_path, text).settings, setting) == value


@pytest.mark.parametrize(
    ("pair", "setting", "value"),
    [
        ("'target_modules': ['qkv_proj', 'o_proj']", "lora_target_modules", ("qkv_proj", "o_proj")),
        ("'target_modules': 'o_proj'", "lora_target_modules", ("o_proj",)),
        ("'target_modules': None", "lora_target_modules", None),
        ("'use_dora': False, 'rank_pattern': {}, 'layers_to_transform': None, 'r': 4", "lora_r", 4),
        ("'use_rslora': True", "use_rslora", True),
        ("'use_dora': True", "use_dora", True),
        ("'init_lora_weights': True", "init_lora_weights", "paper"),
        ("'init_lora_weights': 'pissa_niter_16'", "init_lora_weights", "pissa_niter_16"),
        ("'bias': 'lora_only'", "bias", "lora_only"),
        ("'modules_to_save': ['lm_head']", "modules_to_save", ("lm_head",)),
        ("'modules_to_save': None, 'trainable_token_indices': [7]", "trainable_token_indices", (7,)),
        ("'rank_pattern': {'o_proj': 4}", "rank_pattern", {"o_proj": 4}),
        ("'rank_pattern': None", "rank_pattern", {}),
        ("'alpha_pattern': {'o_proj': 4}", "alpha_pattern", {"o_proj": 4.0}),
        ("'layers_to_transform': 3", "layers_to_transform", (3,)),
        ("'layers_to_transform': [0, 3], 'layers_pattern': 'h'", "layers_pattern", ("h",)),
    ],
)
def test_a_key_of_peft_becomes_the_setting_that_does_the_same(tmp_path, pair, setting, value):
    assert getattr(read(tmp_path, f"peft_config = {{{pair}}}\n").settings, setting) == value


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("training_config = {\n 'seed': 1,\n 'learning_rte': 1e-4}\n", "'learning_rte'", 3),
        ("training_config = {\n 'neftune_noise_alpha': 5}\n", "'neftune_noise_alpha'", 2),
        ("seed: 1\ntraining_config = {\n 'optim': 'adagrad'}\n", "'optim' cannot be 'adagrad'", 3),
        ("training_config = {\n 'lr_scheduler_type': 'constant'}\n", "'lr_scheduler_type' cannot be", 2),
        ("training_config = {\n 'report_to': 'all'}\n", "'report_to' cannot be 'all'", 2),
        ("training_config = {\n 'learning_rate': 'high'}\n", "'learning_rate' cannot be", 1),
        ("training_config = 3\n", "does not hold settings", None),
        ("training_config: 3\n", "training_config is not a dictionary", 1),
        ("peft_config = {\n 'bias': 'some'}\n", "'bias' cannot be", 1),
        ("peft_config = {\n 'task_type': 'SEQ_CLS'}\n", "'task_type' cannot be", 2),
        ("peft_config = {\n 'init_lora_weights': 'eva'}\n", "'init_lora_weights' cannot be", 1),
        (
            "peft_config = {\n 'trainable_token_indices': {'wte': [3]}}\n",
            "'trainable_token_indices' cannot",
            1,
        ),
        ("peft_config = {\n 'exclude_modules': ['o_proj']}\n", "'exclude_modules' cannot be", 2),
        ("peft_config = {\n 'rank_pattern': {'o_proj': 0}}\n", "'rank_pattern' cannot be", 1),
    ],
)
def test_what_has_no_counterpart_is_refused_with_its_line(tmp_path, text, what, line):
    error = refused(tmp_path, text)
    assert what in error.what
    if line:
        assert f"lora.yaml:{line}" in error.where


def test_a_dictionary_elsewhere_is_no_python(tmp_path):
    assert "unknown setting 'other'" in refused(tmp_path, "other: {a: 1}\n").what
    with pytest.raises(SettingsError, match="not a dictionary"):
        translate("peft_config", "all", str)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_come_back_from_their_file(tmp_path, name):
    settings = TrainingSettings(**PRESETS[name].values)
    found = read(tmp_path, lora_yaml(settings))
    assert found.settings == settings
    assert found.notes == ()


@pytest.mark.parametrize(
    ("name", "differing"),
    [
        ("default", {}),
        (
            "phi-silica",
            {
                "finetune_train_nsamples": 8000, "finetune_train_batch_size": 2,
                "finetune_train_seqlen": 1024, "lr_scheduler_type": "linear_with_warmup",
            },
        ),
        ("aion", {"finetune_train_batch_size": 2, "finetune_train_seqlen": 1024, "lora_dropout": 0.0}),
    ],
)  # fmt: skip
def test_templates_differ_from_the_published_list_where_the_templates_do(name, differing):
    ours, default = TrainingSettings(**PRESETS[name].values), TrainingSettings()
    found = {key: value for key, value in ours.model_dump().items() if value != getattr(default, key)}
    assert found == differing


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(SettingsError) as caught:
        preset("phi-silca")
    assert caught.value.do == "write 'phi-silica'"
