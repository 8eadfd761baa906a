"""The picture says what the events say, and the same events give the same bytes."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from phinetune.base.errors import UserError
from phinetune.reports.history import history
from phinetune.reports.plots import MAX_POINTS, _thinned, loss_plot, picture, smoothed

from .records import course, evaluated, records, stepped, write_events


def svg_text(path) -> str:
    return path.read_text(encoding="utf-8")


def test_svg_names_run_curves_and_best_step(tmp_path):
    run = tmp_path / "20261120-142233-k3f"
    loss_plot(write_events(run / "events.jsonl", course()), run / "plots" / "loss.svg")
    text = svg_text(run / "plots" / "loss.svg")
    ET.fromstring(text)
    for words in (
        "Loss of run 20261120-142233-k3f",
        "training, smoothed",
        "test",
        "best test loss 0.210 at step 30",
    ):
        assert words in text
    assert "<dc:date>" not in text


def test_same_events_same_bytes(tmp_path):
    write_events(tmp_path / "run" / "events.jsonl", course())
    pictures = []
    for name in ("one.svg", "two.svg"):
        loss_plot(tmp_path / "run" / "events.jsonl", tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]


def test_png_when_the_suffix_says_so(tmp_path):
    loss_plot(write_events(tmp_path / "run" / "events.jsonl", course()), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "found",
    [
        [],
        [evaluated(0, 3.0)],
        [stepped(1, 2.0)],
        [stepped(1, math.nan), stepped(2, math.inf)],
        [stepped(step, math.nan if step % 3 else 1.0, 30) for step in range(1, 31)],
    ],
)
def test_odd_runs_still_give_a_picture(found):
    ET.fromstring(picture(history(records(found)), "odd"))


def test_a_title_is_text_not_markup_or_mathematics():
    data = picture(history(records(course())), "<script>alert(1)</script> $x_1$")
    assert b"<script" not in data
    assert b"$x_1$" in data


def test_no_event_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no event file"):
        loss_plot(tmp_path / "events.jsonl", tmp_path / "loss.svg")


def test_long_runs_are_thinned_by_means():
    values = np.arange(10_000, dtype=float)
    steps, means, size = _thinned(np.arange(1, 10_001, dtype=float), values)
    assert len(means) == MAX_POINTS
    assert size == 10
    assert means[0] == pytest.approx(4.5)
    assert steps[0] == pytest.approx(5.5)


def test_smoothing_leaves_a_straight_line_alone_and_calms_noise():
    line = np.linspace(3, 1, 100)
    assert smoothed(line) == pytest.approx(line)
    noise = np.random.default_rng(0).normal(size=400)
    assert smoothed(noise)[50:-50].std() < 0.3 * noise.std()
