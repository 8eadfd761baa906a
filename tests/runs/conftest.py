"""A tiny project: a random model under the demo base's tokenizer, 8 training and 3 test chats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_project import WORDS, write_chats, write_model

from phinetune.runs.project import create_project
from phinetune.training.settings import TrainingSettings


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two model folders of one shape with different weights."""
    root = tmp_path_factory.mktemp("models")
    return write_model(root / "one", 0), write_model(root / "two", 1)


@pytest.fixture
def new_project(models: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """Makes a project; settings may be changed by name."""
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
