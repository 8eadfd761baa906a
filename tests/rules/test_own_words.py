"""The project speaks of itself alone: no paths of one machine, no package hosts, nobody's mail address."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "tools", "benchmarks", "docs", ".ci")
FILES = ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt")
SUFFIXES = {"", ".cfg", ".css", ".html", ".js", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}

# Split, so that this file does not break its own rule.
FORBIDDEN = re.compile(
    "|".join(
        [
            r"(?<![\w.])/" + r"(?:work|root|opt/pypi)\b",
            r"/" + r"tmp/team",
            r"/" + r"home/[a-z]",
            r"C:\\" + r"Users",
            r"py" + r"pi\.org|" + r"python" + r"hosted",
            r"download\." + r"pytorch\.org",
            r"registry\." + r"npmjs",
        ]
    )
)


def project_files() -> list[Path]:
    files = [ROOT / name for name in FILES]
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in SUFFIXES]
    return [path for path in files if path.exists() and "__pycache__" not in path.parts]


def test_the_project_speaks_of_itself_alone() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in project_files()
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["see /" + "work/data", "pip from py" + "pi.org", "/" + "root/x"])
def test_a_foreign_word_is_seen(text: str) -> None:
    assert FORBIDDEN.search(text)


@pytest.mark.parametrize("text", ["the framework/tools", "a root/x", "https://huggingface.co"])
def test_own_words_are_left_alone(text: str) -> None:
    assert not FORBIDDEN.search(text)
