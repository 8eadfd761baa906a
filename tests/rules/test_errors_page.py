"""The page of errors names every class, with its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from phinetune.base import errors
from phinetune.cli.console import exit_code_of

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text("utf-8")
CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.PhinetuneError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_documented_with_its_exit_code(kind: type[errors.PhinetuneError]) -> None:
    assert f"| `{kind.__name__}` | {exit_code_of(kind('something'))} |" in PAGE
