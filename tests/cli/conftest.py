"""A tiny model and one finished run of it, shared by the tests of the commands."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: random Phi-3 weights of width 32 under the demo base's tokenizer."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    from phinetune.models.catalog import demo_folder

    folder = tmp_path_factory.mktemp("tiny model")  # a name with a space, as people have them
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def project(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with 8 training and 3 test chats."""
    from colour_chats import WORDS, write_chats

    from phinetune.runs.project import create_project
    from phinetune.training.settings import TrainingSettings

    data = tmp_path_factory.mktemp("data")
    write_chats(data / "train.json", WORDS)
    write_chats(data / "test.json", WORDS[:3])
    settings = TrainingSettings(
        model=str(tiny_model),
        finetune_dataset="dataset",
        finetune_train_seqlen=64,
        finetune_test_seqlen=64,
        num_training_steps=4,
        eval_steps=2,
        save_steps=2,
        learning_rate=1e-3,
        lora_r=4,
        lora_alpha=8.0,
        dtype="float32",
        device="cpu",
        compare_max_new_tokens=4,
    )
    folder = tmp_path_factory.mktemp("projects") / "colours"
    create_project(folder, settings, train=data / "train.json", test=data / "test.json")
    return folder


@pytest.fixture(scope="session")
def run_folder(project: Path) -> Path:
    """The project's one finished run."""
    from phinetune.runs.train_run import train_run

    for _ in train_run(project, run_name="first"):
        pass
    return project / "runs" / "first"
