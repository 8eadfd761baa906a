"""Rendered chats as tables of ids, worked out once by transformers: they may never change."""

# ruff: noqa: E501 (a table of ids is not read by line)
from __future__ import annotations

from pathlib import Path

import made_up_models as made
import pytest

from phinetune.text.render import load_renderer

CHAT = made.chat(
    ("system", "be brief"),
    ("user", " hi\n"),
    ("assistant", "\nhello a\n", 0),
    ("user", "x"),
    ("assistant", " y"),
)

# name: the ids of CHAT in the made-up byte-level vocabulary, and the places of its trained tokens
# fmt: off
GOLDEN = {
    "phi3": (
        [265, 65, 68, 220, 65, 81, 72, 68, 69, 268, 266, 71, 72, 198, 268, 267, 257, 258, 78, 256, 198, 268, 266, 87, 268, 267, 88, 268, 264],
        [26, 27],
    ),
    "phi3.5": (
        [265, 65, 68, 220, 65, 81, 72, 68, 69, 268, 266, 71, 72, 198, 268, 267, 257, 258, 78, 256, 198, 268, 266, 87, 268, 267, 88, 268, 264],
        [26, 27],
    ),
    "phi4-mini": (
        [265, 65, 68, 220, 65, 81, 72, 68, 69, 268, 266, 71, 72, 198, 268, 267, 257, 258, 78, 256, 198, 268, 266, 87, 268, 267, 88, 268, 264],
        [26, 27],
    ),
    "phi4": (
        [269, 82, 88, 82, 83, 68, 76, 270, 65, 68, 220, 65, 81, 72, 68, 69, 271, 269, 84, 82, 68, 81, 270, 220, 71, 72, 198, 271, 269, 64, 82, 82, 72, 82, 83, 64, 77, 83, 270, 198, 257, 258, 78, 256, 198, 271, 269, 84, 82, 68, 81, 270, 87, 271, 269, 64, 82, 82, 72, 82, 83, 64, 77, 83, 270, 220, 88, 271],
        [65, 66, 67],
    ),
}
# fmt: on


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_and_trained_places_stay_as_they_are(name: str, tmp_path: Path) -> None:
    ids, places = GOLDEN[name]
    rendered = load_renderer(made.phi_model(tmp_path, name)).example(CHAT)
    assert rendered.ids.tolist() == ids
    assert rendered.trained.nonzero()[0].tolist() == places
