"""Write the answers of several models to the same prompts as one HTML page without scripts.

All text is escaped. Knows nothing of how answers were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from phinetune.base.files import write_atomically


def write_answers(path: Path, title: str, sides: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> None:
    """`answers` hold `prompt` (turns), `reference` (or None) and a text for each of `sides`."""
    environment = Environment(
        loader=PackageLoader("phinetune.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("answers.html.jinja").render(title=title, sides=sides, answers=answers)
    # A lone surrogate in an answer has no UTF-8 form; it must not cost the page.
    write_atomically(path, text.encode("utf-8", "replace"))
