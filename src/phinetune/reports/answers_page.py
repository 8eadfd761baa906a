"""Write the answers of several models to the same prompts as one HTML page without scripts.

All text is escaped. Knows nothing of how answers were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phinetune.base.files import write_atomically
from phinetune.reports.templates import filled


def write_answers(path: Path, title: str, sides: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> None:
    """`answers` hold `prompt` (turns), `reference` (or None) and a text for each of `sides`."""
    write_atomically(path, filled("answers.html.jinja", title=title, sides=sides, answers=answers))
