"""The content filter's card says what the weights that ship do on texts they never saw."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import train_content_filter as tool

from phinetune.safety.linear import bundled

DATA = Path(os.environ.get("PHINETUNE_DATA", "")) / "safety"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs PHINETUNE_DATA with the folder safety")
def test_the_cards_figures_are_those_measured_now():
    measured = tool.figures(bundled(), tool.held_out_rows(DATA))
    card = tool.CARD.read_text(encoding="utf-8")
    table = [line for line in tool.card(measured, 0, 0).splitlines() if line.startswith("| ")]
    assert len(table) > 20
    for line in table:
        assert line in card
