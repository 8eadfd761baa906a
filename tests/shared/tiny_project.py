"""A tiny model folder under the demo base's tokenizer, and chats to train it on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phinetune.models.catalog import demo_folder

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
