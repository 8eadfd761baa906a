"""The benchmark for GPUs runs whole on a tiny model, and counts what its page says it counts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from benchmark_scripts import BENCHMARKS, script


def test_work_is_counted_by_the_formula():
    shape = script("train_gpu_sides").PHI3_MINI
    weights = 32 * (3072 * 9216 + 3072 * 3072 + 3072 * 16384 + 8192 * 3072)
    assert weights == pytest.approx(3.6239e9, rel=1e-4)
    # Four rows of 2,048, all trained: 16.30 GFLOP a token (half a percent: a row has no first target).
    assert shape.flops([2048] * 4, 4 * 2048) / 8192 == pytest.approx(16.30e9, rel=5e-3)
    assert shape.flops([8], 0) == 4 * weights * 8 + 14 * 32 * 3072 * 36
    assert shape.flops([4, 4], 0) < shape.flops([8], 0)
    assert shape.flops([8], 3) - shape.flops([8], 0) == 4 * 3072 * 32064 * 3


def test_chats_fill_a_step():
    lengths = script("train_gpu").chat_lengths(8192, 146, 2048)
    assert 8192 <= sum(lengths) < 8192 + 8
    assert 30 < len(lengths) < 80
    assert lengths == script("train_gpu").chat_lengths(8192, 146, 2048)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_script_on_a_tiny_model(tmp_path):
    out = tmp_path / "result.json"
    arguments = ["--tiny", "--device", "cpu", "--turns", "1", "--compile-backend", "eager", "--out", str(out)]
    command = [sys.executable, str(BENCHMARKS / "train_gpu.py"), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report == json.loads(out.read_text())
    assert report["gemm_tflops"] > 0
    assert [(row["kind"], row["side"]) for row in report["rows"]] == [
        (kind, side) for kind in ("full", "chats") for side in ("ours", "peft-eager", "peft-compiled")
    ]
    for kind in ("full", "chats"):
        rows = [row for row in report["rows"] if row["kind"] == kind]
        for row in rows:
            # The same work from the same start: the losses before and after four updates agree.
            assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], abs=2e-3)
            assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], abs=2e-3)
            assert row["last_loss"] < row["first_loss"]
            assert 0 < row["utilisation_of_measured_gemm"] < 1
    assert set(report["comparison"]) == {
        f"{kind}_over_peft-{form}" for kind in ("full", "chats") for form in ("eager", "compiled")
    }


def test_the_real_shape_is_refused_without_a_gpu():
    command = [sys.executable, str(BENCHMARKS / "train_gpu.py"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "use --tiny" in done.stderr
