"""Make the table of results in benchmarks/README.md and its picture from benchmarks/results/*.json.

    python benchmarks/train_cpu.py --json > benchmarks/results/train_cpu.json
    python benchmarks/report.py            writes both
    python benchmarks/report.py --check    fails when they are stale

A result is what a script prints with --json, kept under the script's name; what comes after a dot in the
name tells one result from another: `scaling.two-gigabytes.json`. Nothing is computed but ratios' rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machine import measured_on

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
PICTURE = HERE.parent / "docs" / "pictures" / "scaling.svg"
BEGIN, END = "<!-- results: made by report.py -->", "<!-- end of results -->"

Figures = Iterator[tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the table is stale")
    options = parser.parse_args()
    now = README.read_text(encoding="utf-8")
    new = with_table(now, table(RESULTS))
    if options.check:
        sys.exit(0 if now == new else "benchmarks/README.md is stale: run python benchmarks/report.py")
    README.write_text(new, encoding="utf-8")
    draw(RESULTS, PICTURE)


def with_table(page: str, table: str) -> str:
    """The page with the table between its two marks. Raises ValueError without them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the marks of the results are missing")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def table(folder: Path) -> str:
    """One line a figure, in the order of the files' names, and below it where each was measured."""
    lines = ["| result | figure | |", "|---|---|---|"]
    notes = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        script, name = path.stem.partition(".")[0], path.stem
        if script not in FIGURES:
            raise ValueError(f"{path.name}: no script of that name has a line in the table")
        for text, value in FIGURES[script](report):
            lines.append(f"| {name} | {text} | {value} |")
        quick = "; the quick form" if report.get("quick") else ""
        notes.append(f"- {name}: {measured_on(report)}{quick}")
    return "\n".join([*lines, "", *notes, ""])


def _train_cpu(report: dict[str, Any]) -> Figures:
    yield "tokens/s over the best peer's", f"{report['speed_ratio_best_peer']:.2f}"
    yield "tokens/s over TRL's default", f"{report['speed_ratio_default_peer']:.2f}"
    yield "peak memory over the best peer's", f"{report['memory_ratio_best_peer']:.2f}"
    if "gemm_share" in report:
        yield "time of bare matrix products in a step", f"{report['gemm_share']:.0%}"
    for row in report["rows"]:
        rate, peak = row["tokens_per_second"], row["peak_memory_bytes"] / 1e9
        yield f"{row['side']}: tokens/s; peak", f"{rate:,.0f}; {peak:.2f} GB"


def _generate(report: dict[str, Any]) -> Figures:
    yield "8 adapters in one batch over the base alone", f"{report['mixed_over_base']:.2f}"
    yield "… over one request after another", f"{report['mixed_over_sequential']:.2f}"
    yield "… over PEFT's mixed batch", f"{report['mixed_over_peft']:.2f}"


def _forecast(report: dict[str, Any]) -> Figures:
    for what in ("memory", "seconds", "seconds_after_20_steps"):
        if f"{what}_median_percent" in report:
            name = what.replace("_", " ")
            yield (
                f"error of forecast {name}: median; worst; within 15 %",
                f"{report[f'{what}_median_percent']} %; {report[f'{what}_worst_percent']} %; "
                f"{report[f'{what}_within_15']}",
            )


def _shared_prefix(report: dict[str, Any]) -> Figures:
    rows = f"{report['prefix_tokens']} common of {report['mean_row_tokens']:.0f} tokens a row"
    yield f"tokens/s, shared prefix over each row ({rows})", f"{report['ratio']:.2f}"
    yield "… by CPU seconds", f"{report['cpu_ratio']:.2f}"


def _kept_states(report: dict[str, Any]) -> Figures:
    blocks = f"top {report['adapted_blocks']} blocks adapted, {report['bytes_per_token']:,.0f} bytes a token"
    yield f"tokens/s, kept states over computed ones ({blocks})", f"{report['ratio']:.2f}"
    yield "… by CPU seconds", f"{report['cpu_ratio']:.2f}"


def _data_check(report: dict[str, Any]) -> Figures:
    size = _size(1e6 * report["file_mb"])
    yield (
        f"{report['rows']:,} rows, {size}, near-duplicates included: time; peak",
        f"{report['seconds']:,.0f} s; {_size(1e6 * report['peak_memory_mb'])}",
    )


def _scaling(report: dict[str, Any]) -> Figures:
    for axis, result in report["axes"].items():
        if "largest_deviation" in result:
            yield f"{axis}: largest deviation from a straight line", f"{result['largest_deviation']:.1%}"
        for row in result["rows"]:
            if "num_rows" in row:
                first = row["cached_first_step_wall_seconds"]
                yield (
                    f"{row['num_rows']:,} rows, {_size(row['file_bytes'])}: rendering; peak; "
                    "first step when tokenised before",
                    f"{row['rows_per_second']:,.0f} rows/s of CPU; {_size(row['peak_bytes'])}; {first:.0f} s",
                )
        if "largest_memory_beyond_first" in result:
            yield f"{axis}: memory beyond the smallest file's", _size(result["largest_memory_beyond_first"])


def _train_gpu(report: dict[str, Any]) -> Figures:
    if report["tiny"]:
        raise ValueError("figures of the tiny form say nothing and are not listed")
    yield "bf16 products of these shapes", f"{report['gemm_tflops']:.0f} TFLOP/s"
    for row in report["rows"]:
        if "failed" not in row:
            yield (
                f"{row['kind']}, {row['side']}: tokens/s; model FLOPs of the products' rate; peak",
                f"{row['tokens_per_second']:,.0f}; {row['utilisation_of_measured_gemm']:.0%}; "
                f"{_size(row['peak_memory_bytes'])}",
            )
    for name, ratio in report["comparison"].items():
        yield f"tokens/s, {name.replace('_', ' ')}", f"{ratio:.2f}"


FIGURES: dict[str, Callable[[dict[str, Any]], Figures]] = {
    "train_cpu": _train_cpu,
    "generate": _generate,
    "forecast": _forecast,
    "shared_prefix": _shared_prefix,
    "kept_states": _kept_states,
    "data_check": _data_check,
    "scaling": _scaling,
    "train_gpu": _train_gpu,
}


def _size(size_bytes: float) -> str:
    if abs(size_bytes) >= 1e9:
        return f"{size_bytes / 1e9:.2f} GB"
    return f"{size_bytes / 1e6:.0f} MB" if abs(size_bytes) >= 1e7 else f"{size_bytes / 1e6:.1f} MB"


def draw(folder: Path, picture: Path) -> None:
    """Cost against work on every axis of scaling.json, with its straight line; nothing without that file."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    from phinetune.reports.plots import STYLE, TEST, TRAIN

    source = folder / "scaling.json"
    if not source.is_file():
        return
    axes = json.loads(source.read_text(encoding="utf-8"))["axes"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 5.4), layout="constrained")
        for place, (axis, result) in zip(figure.subplots(2, 2).flat, axes.items(), strict=False):
            work, cost, title = _points(axis, result)
            at = np.geomspace(min(work), max(work), 100)
            if "line_slope" in result:
                scale = 1e6 if axis in ("length", "rank") else 1
                line = scale * (result["line_start"] + result["line_slope"] * at)
                place.plot(at, line, color=TEST, linewidth=1.2, label="straight line")
            place.plot(work, cost, "o", color=TRAIN, label="measured")
            place.set(xscale="log", xlabel=axis, title=title)
            if axis in ("tokens", "rows"):
                place.set(yscale="log")
            else:
                place.set(ylim=(0, None))
            place.legend(frameon=False)
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, format="svg", metadata={"Date": None})


def _points(axis: str, result: dict[str, Any]) -> tuple[list[float], list[float], str]:
    rows = result["rows"]
    if axis == "rows":
        return (
            [row["num_rows"] for row in rows],
            [row["rendering_seconds"] for row in rows],
            "reading and rendering, CPU s",
        )
    if axis == "tokens":
        return [row["num_tokens"] for row in rows], [row["seconds"] for row in rows], "training, CPU s"
    return [row[axis] for row in rows], [row["microseconds_per_token"] for row in rows], "us a token"


if __name__ == "__main__":
    main()
