"""Rows with labels that a tiny model can learn: the class is the first word."""

from __future__ import annotations

import json
from pathlib import Path

COLOURS = ("blue", "green", "red")
_ENDINGS = ("one", "two cups", "the three of them", "and a fourth", "five", "six cups")


def write_labelled(path: Path, *, as_chats: bool = False, num: int = 18, num_extra: int = 0) -> Path:
    """`num` rows, each colour in turn, and `num_extra` more of the first."""
    rows = []
    for number in range(num + num_extra):
        colour = COLOURS[number % 3 if number < num else 0]
        text = f"{colour} {_ENDINGS[number % len(_ENDINGS)]}"
        turns = [{"role": "user", "content": text}]
        row = {"messages": turns} if as_chats else {"text": text}
        rows.append({**row, "label": colour})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_labelled_set(folder: Path, *, as_chats: bool = False, num_extra: int = 0) -> Path:
    """A data folder of 18 training rows, and the extra ones, and 9 test rows."""
    folder.mkdir()
    write_labelled(folder / "train.json", as_chats=as_chats, num_extra=num_extra)
    write_labelled(folder / "test.json", as_chats=as_chats, num=9)
    return folder
