"""phinetune against transformers with PEFT on one GPU: a model of Phi-3-mini's shape, random weights.

    python benchmarks/train_gpu.py                       a table; less than nine minutes
    python benchmarks/train_gpu.py --json                one JSON object
    python benchmarks/train_gpu.py --out result.json     written anew after every measurement
    python benchmarks/train_gpu.py --tiny --device cpu   the same code on a tiny model: no figure to be quoted

Full rows are 4 x 2,048 tokens, all trained; chats are short rows of log-normal length, a third of each
trained. What is measured, and why it is fair: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine, measured_on, versions

PACKAGES = ("phinetune", "torch", "transformers", "peft")
SIDES = ("ours", "peft-eager", "peft-compiled")
# The datasheet's dense bfloat16 rate of an H100 and H200, in TFLOP/s.
DATASHEET_TFLOPS = 989.4


def main() -> None:
    options = _options()
    if options.gemm:
        print(json.dumps(_gemm(options.device, options.tiny)))
        return
    began = time.perf_counter()
    report: dict[str, Any] = {
        "benchmark": "train_gpu",
        "tiny": options.tiny,
        "device": options.device,
        "machine": machine(0),
        "versions": versions(PACKAGES),
        "rows": [],
    }
    flags = ["--tiny"] if options.tiny else []
    report |= _process([__file__, "--gemm", "--device", options.device, *flags])
    for turn in range(options.turns):
        for kind in options.kinds.split(","):
            for side in options.sides.split(","):
                left = options.seconds - (time.perf_counter() - began)
                if turn and left < 60:
                    continue
                row = _side(side, kind, options)
                report["rows"].append({"kind": kind, "turn": turn, **_with_rates(row, report)})
                _write(report, options.out)
    report["seconds"] = round(time.perf_counter() - began, 1)
    report["comparison"] = _comparison(report["rows"])
    _write(report, options.out)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="phinetune against transformers with PEFT on one GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", default="", help="a file that is written after every measurement")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    parser.add_argument("--sides", default=",".join(SIDES), help="with commas between")
    parser.add_argument("--kinds", default="full,chats", help="with commas between")
    parser.add_argument("--turns", type=int, default=2, help="how often each side runs")
    parser.add_argument("--seconds", type=float, default=480, help="no second turn is begun near this")
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile")
    parser.add_argument("--gemm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("Phi-3-mini's shape needs a GPU; on a CPU use --tiny")
    return options


def chat_lengths(num_tokens: int, median: float, most: int) -> list[int]:
    """Log-normal lengths that make up `num_tokens`, at most half a row more."""
    chance = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        length = int(median * chance.lognormvariate(0, 0.6))
        lengths.append(min(max(length, 8), most, max(8, num_tokens - sum(lengths))))
    return lengths


def _side(side: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side in a process that has held nothing yet."""
    row, num_rows = (64, 4) if options.tiny else (2048, 4)
    lengths = [row] * num_rows if kind == "full" else chat_lengths(row * num_rows, row / 14, row)
    task = {
        "side": side,
        "device": options.device,
        "is_tiny": options.tiny,
        "lengths": lengths,
        "trained_share": 1.0 if kind == "full" else 1 / 3,
        "num_steps": 2 if options.tiny else 20,
        "num_blocks": 2 if options.tiny else 3,
        "num_warmup_steps": 2 if options.tiny else 5,
        "compile_backend": options.compile_backend,
    }
    print(f"{kind}, {side} …", file=sys.stderr, flush=True)
    return _process([str(Path(__file__).with_name("train_gpu_sides.py")), json.dumps(task)])


def _process(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        # A side that fails is a result too: the others go on.
        print(done.stderr[-2000:], file=sys.stderr)
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _with_rates(row: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Model FLOPs over what the machine's matrix products reach, and over the datasheet."""
    if "failed" in row:
        return row
    measured = report.get("gemm_tflops")
    return {
        **row,
        "utilisation_of_measured_gemm": row["model_tflops"] / measured if measured else None,
        "utilisation_of_datasheet": row["model_tflops"] / DATASHEET_TFLOPS,
    }


def _comparison(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Our tokens per second over theirs, of the medians over the turns."""
    rates: dict[tuple[str, str], float] = {}
    for row in rows:
        if "failed" not in row:
            key = row["kind"], row["side"]
            same = [r["tokens_per_second"] for r in rows if (r["kind"], r.get("side")) == key]
            rates[key] = statistics.median(same)
    return {
        f"{kind}_over_{side}": rates[kind, "ours"] / rate
        for (kind, side), rate in rates.items()
        if side != "ours" and (kind, "ours") in rates
    }


def _gemm(device_name: str, is_tiny: bool) -> dict[str, Any]:
    """The bfloat16 rate over a step's products: every linear's forward and input gradient, in TFLOP/s.

    Several copies of each weight, so that none is found in the cache.
    """
    import torch
    from train_gpu_sides import PHI3_MINI, TINY

    shape, num_tokens = (TINY, 256) if is_tiny else (PHI3_MINI, 8192)
    device = torch.device(device_name)
    num_copies, num_rounds = (2, 2) if is_tiny else (4, 5)
    flops, seconds = 0.0, 0.0
    shapes: dict[str, Any] = {}
    for name, (inputs, outputs) in {**shape.linears, "head": (shape.hidden, shape.vocab)}.items():
        times = shape.layers if name != "head" else 1
        weights = [torch.randn(outputs, inputs, device=device).bfloat16() for _ in range(num_copies)]
        x_TI = torch.randn(num_tokens, inputs, device=device).bfloat16()
        dy_TO = torch.randn(num_tokens, outputs, device=device).bfloat16()
        rates = {}
        for part in ("forward", "backward"):
            given = x_TI if part == "forward" else dy_TO
            factors = [weight.t() if part == "forward" else weight for weight in weights]
            given @ factors[0]
            rounds = []
            for _ in range(num_rounds):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                for factor in factors:
                    given @ factor
                if device.type == "cuda":
                    torch.cuda.synchronize()
                rounds.append((time.perf_counter() - began) / num_copies)
            took, work = statistics.median(rounds), 2.0 * num_tokens * inputs * outputs
            rates[part] = work / took / 1e12
            flops, seconds = flops + times * work, seconds + times * took
        shapes[name] = rates
    found: dict[str, Any] = {"gemm_tflops": flops / seconds / 1e12, "gemm_shapes_tflops": shapes}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def _write(report: dict[str, Any], out: str) -> None:
    if out:
        Path(out).write_text(json.dumps(report, indent=2), encoding="utf-8")


def _print(report: dict[str, Any]) -> None:
    print(measured_on(report))
    if report["tiny"]:
        print("a tiny model: these figures say nothing")
    print(f"matrix products of these shapes: {report.get('gemm_tflops') or 0:.1f} TFLOP/s\n")
    for row in report["rows"]:
        if "failed" in row:
            print(f"{row['kind']:<7}failed: {row['failed']}")
            continue
        memory = row["peak_memory_bytes"]
        print(
            f"{row['kind']:<7}{row['side']:<15}{row['tokens_per_second']:>9.0f} tokens/s"
            f"{row['utilisation_of_measured_gemm'] or 0:>7.0%} of the products"
            f"{'' if memory is None else f'{memory / 1e9:8.1f} GB'}"
            f"  loss {row['first_loss']:.4f}, {row['last_loss']:.4f}"
            f"  first step {row['first_step_seconds']:.1f} s"
        )
    for name, ratio in report["comparison"].items():
        print(f"{name:<32}{ratio:.2f}")


if __name__ == "__main__":
    main()
