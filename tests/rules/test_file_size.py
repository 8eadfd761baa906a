"""Files stay short enough to be read in one sitting."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_LINES = 500


def test_no_file_is_longer_than_the_cap() -> None:
    files = [path for top in ("src", "tests", "tools", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    lengths = sorted(((len(path.read_text("utf-8").splitlines()), path) for path in files), reverse=True)
    assert lengths
    print("\nthe five longest files:")
    for length, path in lengths[:5]:
        print(f"{length:6} {path.relative_to(ROOT)}")
    too_long = [f"{path.relative_to(ROOT)}: {length}" for length, path in lengths if length > MAX_LINES]
    assert not too_long, f"over {MAX_LINES} lines: {too_long}"
