"""A tiny project: a random model under the demo base's tokenizer, 8 training and 3 test chats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_project import project_maker, write_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two model folders of one shape with different weights."""
    root = tmp_path_factory.mktemp("models")
    return write_model(root / "one", 0), write_model(root / "two", 1)


@pytest.fixture
def new_project(models: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """Makes a project; settings may be changed by name."""
    return project_maker(models, tmp_path)
