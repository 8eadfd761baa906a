"""A small chat data set: name the colour of the door."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ("red", "blue", "green", "grey", "pink", "black", "white", "brown")


def write_chats(path: Path, colours: tuple[str, ...]) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Name the colour."},
                {"role": "user", "content": f"The door is {colour}."},
                {"role": "assistant", "content": colour},
            ]
        }
        for colour in colours
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
