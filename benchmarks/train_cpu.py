"""phinetune against TRL with PEFT on a CPU: same rows, same updates, each run in its own process.

    pip install -e .[bench]
    python benchmarks/train_cpu.py            a table
    python benchmarks/train_cpu.py --json     one JSON object
    python benchmarks/train_cpu.py --quick    a smaller run

First every form of TRL makes a few steps; the fastest of them is the best peer. Then ours, the best
peer and TRL's defaults run in turns. What is measured, and why it is fair: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import machine, measured_on, versions
from train_cpu_sides import PEERS
from train_cpu_work import Work, read_rows

PACKAGES = ("phinetune", "torch", "transformers", "peft", "trl", "accelerate")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_DISABLED": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How much is run: steps of a probe and of a turn, of which the first are not counted, and turns."""

    rows_per_step: int
    num_layers: int
    num_probe_steps: int
    num_steps: int
    num_warmup_steps: int
    num_turns: int
    peers: tuple[str, ...]


FULL = Length(
    rows_per_step=8,
    num_layers=12,
    num_probe_steps=3,
    num_steps=8,
    num_warmup_steps=2,
    num_turns=2,
    peers=tuple(PEERS),
)
QUICK = Length(
    rows_per_step=4,
    num_layers=4,
    num_probe_steps=0,
    num_steps=6,
    num_warmup_steps=2,
    num_turns=1,
    peers=("default", "bf16-padding-free-accumulated"),
)


def main() -> None:
    options = _options()
    length = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="train-cpu-") as name:
        report = _measured(Path(name), length, options.threads)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="phinetune against TRL with PEFT on a CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    return parser.parse_args()


def _measured(folder: Path, length: Length, threads: int) -> dict[str, Any]:
    work = Work(num_steps=length.num_steps, rows_per_step=length.rows_per_step, num_layers=length.num_layers)
    work.write(folder)
    _run(folder, "prepare", 0, 0, threads)
    best = _best_peer(folder, length, threads)
    sides = list(dict.fromkeys(["ours", best, "default"]))
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(length.num_turns):
        for side in sides:
            # Each turn draws its own dropout, so that our two curves show how much is noise.
            runs[side].append(_run(folder, side, length.num_steps, turn, threads))
    return _report(folder, work, length, best, runs, threads)


def _best_peer(folder: Path, length: Length, threads: int) -> str:
    """The form of TRL with the shortest steps, after one step of warm-up."""
    if not length.num_probe_steps:
        return length.peers[-1]
    seconds = {}
    for name in length.peers:
        run = _run(folder, name, length.num_probe_steps, 0, threads)
        seconds[name] = sum(run["seconds"][1:])
    return min(seconds, key=lambda name: seconds[name])


def _run(folder: Path, side: str, num_steps: int, dropout_seed: int, threads: int) -> dict[str, Any]:
    environment = {**os.environ, **QUIET}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    script = Path(__file__).with_name("train_cpu_sides.py")
    command = [sys.executable, str(script), str(folder), side, str(num_steps), str(dropout_seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    if result:
        _say(f"{side:<30} {num_steps:>3} steps  {sum(result['seconds']):6.1f} s")
    return result


def _report(
    folder: Path,
    work: Work,
    length: Length,
    best: str,
    runs: dict[str, list[dict[str, Any]]],
    threads: int,
) -> dict[str, Any]:
    tokens = _tokens_per_step(folder, work)
    rows = [_row(side, runs[side], tokens, length, runs["ours"]) for side in runs]
    row = {entry["side"]: entry for entry in rows}
    gemm = [
        share
        for run in runs["ours"]
        for share in _counted(
            [g / s for g, s in zip(run["gemm_seconds"], run["seconds"], strict=True)], length
        )
    ]
    ours = row["ours"]
    return {
        "speed_ratio_best_peer": ours["tokens_per_second"] / row[best]["tokens_per_second"],
        "speed_ratio_default_peer": ours["tokens_per_second"] / row["default"]["tokens_per_second"],
        "memory_ratio_best_peer": ours["peak_memory_bytes"] / row[best]["peak_memory_bytes"],
        "gemm_share": statistics.median(gemm),
        "rows": rows,
        "best_peer": best,
        "compute": runs["ours"][0]["compute"],
        "tokens": sum(tokens),
        "trained_share": sum(len(r.ids) - r.num_prompt for r in read_rows(folder)) / sum(tokens),
        "machine": machine(threads),
        "versions": versions(PACKAGES),
    }


def _row(
    side: str,
    runs: Sequence[dict[str, Any]],
    tokens: Sequence[int],
    length: Length,
    ours: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """One side over all its turns: medians over counted steps, the largest memory, losses."""
    rates = [
        t / s for run in runs for t, s in _counted(list(zip(tokens, run["seconds"], strict=True)), length)
    ]
    cpu = [
        t / s for run in runs for t, s in _counted(list(zip(tokens, run["cpu_seconds"], strict=True)), length)
    ]
    reference = ours[-1] if side == "ours" else ours[0]
    gaps = [abs(a - b) for a, b in zip(runs[0]["losses"], reference["losses"], strict=True)]
    return {
        "side": side,
        "tokens_per_second": statistics.median(rates),
        "tokens_per_cpu_second": statistics.median(cpu),
        "peak_memory_bytes": max(run["peak_bytes"] for run in runs),
        "first_loss": runs[0]["losses"][0],
        "final_loss": runs[0]["losses"][-1],
        # Of "ours": between its own turns, which differ in dropout only. Of a peer: to ours.
        "largest_loss_gap": max(gaps),
        "losses": runs[0]["losses"],
        "seconds": [run["seconds"] for run in runs],
    }


def _counted(values: list[Any], length: Length) -> list[Any]:
    return values[length.num_warmup_steps :]


def _tokens_per_step(folder: Path, work: Work) -> list[int]:
    lengths = [len(row.ids) for row in read_rows(folder)]
    size = work.rows_per_step
    return [sum(lengths[start : start + size]) for start in range(0, len(lengths), size)]


def _print(report: dict[str, Any]) -> None:
    print(measured_on(report))
    print(f"{report['tokens']} tokens a turn, {report['trained_share']:.0%} trained; {report['compute']}\n")
    print(f"{'':<32}{'tokens/s':>10}{'per CPU s':>11}{'peak MB':>10}{'loss: first':>13}{'last':>9}{'gap':>9}")
    for row in report["rows"]:
        print(
            f"{row['side']:<32}{row['tokens_per_second']:>10.0f}{row['tokens_per_cpu_second']:>11.0f}"
            f"{row['peak_memory_bytes'] / 1e6:>10.0f}{row['first_loss']:>13.4f}{row['final_loss']:>9.4f}"
            f"{row['largest_loss_gap']:>9.4f}"
        )
    print(
        f"\nspeed against the best peer ({report['best_peer']})  {report['speed_ratio_best_peer']:.2f}\n"
        f"speed against TRL's defaults  {report['speed_ratio_default_peer']:.2f}\n"
        f"our memory against the best peer's  {report['memory_ratio_best_peer']:.2f}\n"
        f"share of bare matrix products in our step  {report['gemm_share']:.2f}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
