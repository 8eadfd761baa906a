"""A tiny model folder under the demo base's tokenizer, and chats to train it on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phinetune.models.catalog import demo_folder
from phinetune.runs.project import create_project
from phinetune.training.settings import TrainingSettings

WORDS = ["red", "green blue", "a longer yellow", "one", "two", "three", "four and five", "six"]


def write_chats(path: Path, words: list[str]) -> Path:
    chats = [[("user", f"Say {word}!"), ("assistant", f"{word}, {word}.")] for word in words]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = Phi3Config(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=256,
        pad_token_id=1, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, folder / name)
    return folder


def project_maker(models: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a project of 8 training and 3 test chats; settings are changed by name."""
    train = write_chats(tmp_path / "train.json", WORDS)
    test = write_chats(tmp_path / "test.json", WORDS[:3])

    def make(name: str = "project", **changes: Any) -> Path:
        values: dict[str, Any] = {
            "model": str(models[0]),
            "finetune_dataset": "dataset",
            "finetune_train_seqlen": 64,
            "finetune_test_seqlen": 64,
            "finetune_train_batch_size": 1,
            "num_training_steps": 4,
            "eval_steps": 1,
            "save_steps": 1,
            "learning_rate": 1e-2,
            "lora_dropout": 0.0,
            "lora_r": 4,
            "lora_alpha": 8.0,
            "dtype": "float32",
            "device": "cpu",
            "compare_nsamples": 2,
            "compare_max_new_tokens": 3,
        }
        settings = TrainingSettings(**{**values, **changes})
        create_project(tmp_path / name, settings, train=train, test=test)
        return tmp_path / name

    return make
