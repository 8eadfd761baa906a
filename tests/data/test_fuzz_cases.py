"""What fuzzing found once stays mended: the bytes of each case, by the targets of tools/fuzz_readers.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "fuzz_cases"
FILES = sorted(path for path in CASES.rglob("*") if path.is_file())

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_found_case_is_read_or_refused(path: Path, tmp_path: Path) -> None:
    from fuzz_readers import fuzz_json, fuzz_yaml

    target = {"json": fuzz_json, "yaml": fuzz_yaml}[path.parent.name]
    target(tmp_path)(path.read_bytes())


def test_there_are_cases() -> None:
    assert FILES
