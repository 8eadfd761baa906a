"""The table of results is made from the results, all of them, and is never stale."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from benchmark_scripts import BENCHMARKS, script

MACHINE = {"cpu": "A Processor", "num_cpus": 2, "threads": 1, "load_average": [0.5, 1, 1]}
SCALING = {
    "axes": {
        "rows": {
            "largest_deviation": 0.042,
            "largest_memory_beyond_first": 52_000_000,
            "rows": [
                {
                    "num_rows": 1_000_000,
                    "file_bytes": 2.2e9,
                    "rows_per_second": 4321.0,
                    "peak_bytes": 7e8,
                    "cached_first_step_wall_seconds": 9.6,
                }
            ],
        }
    },
    "quick": False,
    "machine": MACHINE,
    "versions": {"torch": "9.9"},
}
TRAIN_CPU = {
    "speed_ratio_best_peer": 4.567,
    "speed_ratio_default_peer": 8.1,
    "memory_ratio_best_peer": 0.49,
    "gemm_share": 0.613,
    "rows": [{"side": "ours", "tokens_per_second": 1234.5, "peak_memory_bytes": 2.1e9}],
    "machine": {**MACHINE, "threads": "default"},
    "versions": {"torch": "9.9"},
}


def test_the_committed_table_is_what_the_committed_results_say():
    page = (BENCHMARKS / "README.md").read_text("utf-8")
    report = script("report")
    assert report.with_table(page, report.table(BENCHMARKS / "results")) == page, (
        "run: python benchmarks/report.py"
    )


def test_a_table_tells_figures_machine_and_versions(tmp_path):
    (tmp_path / "scaling.two-gigabytes.json").write_text(json.dumps(SCALING))
    (tmp_path / "train_cpu.json").write_text(json.dumps(TRAIN_CPU))
    lines = script("report").table(tmp_path).splitlines()
    name = "scaling.two-gigabytes"
    assert f"| {name} | rows: largest deviation from a straight line | 4.2% |" in lines
    assert f"| {name} | rows: memory beyond the smallest file's | 52 MB |" in lines
    assert any("1,000,000 rows, 2.20 GB" in line and "4,321 rows/s" in line for line in lines)
    assert "| train_cpu | tokens/s over the best peer's | 4.57 |" in lines
    assert f"- {name}: A Processor, 2 CPUs, 1 thread, load 0.5; torch 9.9" in lines
    assert "- train_cpu: A Processor, 2 CPUs, threads: default, load 0.5; torch 9.9" in lines


def test_another_figure_makes_the_page_stale(tmp_path):
    report = script("report")
    (tmp_path / "scaling.json").write_text(json.dumps(SCALING))
    page = report.with_table(f"# Head\n\n{report.BEGIN}\nold\n{report.END}\n\nTail\n", report.table(tmp_path))
    assert page.startswith("# Head\n")
    assert page.endswith("\n\nTail\n")
    assert "old" not in page
    assert report.with_table(page, report.table(tmp_path)) == page
    SCALING["axes"]["rows"]["largest_deviation"] = 0.5
    (tmp_path / "scaling.json").write_text(json.dumps(SCALING))
    assert report.with_table(page, report.table(tmp_path)) != page


def test_what_says_nothing_or_is_not_known_is_refused(tmp_path):
    report = script("report")
    (tmp_path / "train_gpu.json").write_text(json.dumps({"tiny": True}))
    with pytest.raises(ValueError, match="tiny"):
        report.table(tmp_path)
    (tmp_path / "train_gpu.json").rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match="no script of that name"):
        report.table(tmp_path)
    with pytest.raises(ValueError, match="marks"):
        report.with_table("no marks", "")


def test_the_check_says_what_to_do():
    command = [sys.executable, str(BENCHMARKS / "report.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0


def test_a_picture_of_every_axis(tmp_path):
    rows = [
        {"num_tokens": n, "seconds": n / 1e4, "length": n, "rank": n, "microseconds_per_token": 100.0}
        for n in (10, 100)
    ]
    line = {"line_start": 0.0, "line_slope": 1e-4}
    axes = {name: {**line, "rows": rows} for name in ("tokens", "length", "rank")}
    axes["rows"] = {"rows": [{"num_rows": 10, "rendering_seconds": 1.0}]}
    (tmp_path / "scaling.json").write_text(json.dumps({"axes": axes}))
    script("report").draw(tmp_path, tmp_path / "a" / "one.svg")
    script("report").draw(tmp_path, tmp_path / "two.svg")
    drawn = (tmp_path / "two.svg").read_text()
    assert drawn == (tmp_path / "a" / "one.svg").read_text()
    assert all(f">{name}<" in drawn for name in axes)
