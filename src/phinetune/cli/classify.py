"""`phinetune classify`: the class of each line of text, by a trained classifier."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from phinetune.cli import console

NUM_SHOWN = 3
AT_ONCE = 64


def classify(
    run: Annotated[Path, typer.Argument(help="Run folder, or adapter folder.", show_default=False)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; the lines of standard input when none is given.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
) -> None:
    """Say the class of each text, and how sure that is."""
    from phinetune import api

    lines = texts or [line.strip() for line in sys.stdin if line.strip()]
    console.note("loading ...", style="dim")
    classifier = api.load_classifier(run)
    found = [
        entry
        for start in range(0, len(lines), AT_ONCE)
        for entry in classifier.classify(lines[start : start + AT_ONCE])
    ]
    if json:
        console.print_json(
            {
                "classes": [
                    {"text": text, "label": entry.label, "probability": entry.probability}
                    for text, entry in zip(lines, found, strict=True)
                ]
            }
        )
        return
    for text, entry in zip(lines, found, strict=True):
        best = sorted(entry.probabilities.items(), key=lambda pair: -pair[1])[:NUM_SHOWN]
        console.say(f"{', '.join(f'{name} {100 * p:.1f} %' for name, p in best)}  <-  {text}")
