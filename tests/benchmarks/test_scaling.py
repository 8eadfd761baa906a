"""The line is the best one, its deviation the largest, and every axis is measured."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from benchmark_scripts import BENCHMARKS, script


def test_a_straight_line_deviates_by_nothing():
    start, slope, deviation = script("scaling").straight_line([10, 100, 1000], [7, 52, 502])
    assert (start, slope) == pytest.approx((2, 0.5))
    assert deviation == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("power", [1.2, 2.0])
def test_what_grows_faster_is_seen(power):
    work = np.array([1e4, 1e5, 1e6])
    assert script("scaling").straight_line(work, work**power)[2] > 0.15


def test_made_up_chats_are_sound_and_alike(tmp_path):
    from phinetune.data.reading import load_examples

    size = script("scaling")._write_chats(tmp_path / "train.jsonl", 50, 100)
    assert (tmp_path / "train.jsonl").stat().st_size == size
    examples = load_examples(tmp_path / "train.jsonl")
    assert len(examples) == 50
    assert len({example.messages[0].content for example in examples}) == 50
    assert 600 < size / 50 < 750


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_form_measures_every_axis():
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--quick", "--json", "--only", "tokens,rows"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert list(report["axes"]) == ["tokens", "rows"]
    tokens, rows = report["axes"].values()
    assert tokens["largest_deviation"] < 1
    assert [row["num_rows"] for row in rows["rows"]] == [1_000, 10_000]
    for row in rows["rows"]:
        assert row["cache_bytes"] >= 4 * row["num_training_tokens"]
        assert row["cached_first_step_wall_seconds"] > 0
