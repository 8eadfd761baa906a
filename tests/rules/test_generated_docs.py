"""The generated pages say what the code says now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from phinetune.training.settings import TrainingSettings

ROOT = Path(__file__).parents[2]


def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "tools" / "write_docs.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "settings.md", "data-rules.md"])
def test_generated_pages_are_not_stale(name: str) -> None:
    assert (ROOT / "docs" / name).read_text("utf-8") == writer().pages()[name], "run: make docs"


def test_every_setting_is_documented_with_a_meaning() -> None:
    page = writer().settings_page()
    for name, field in TrainingSettings.model_fields.items():
        assert f"| `{name}` |" in page
        assert field.description
        assert len(field.description) > 10
