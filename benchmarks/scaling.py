"""Is cost against work a straight line? Tokens, length, rank and rows, each case in a process of its own.

    python benchmarks/scaling.py                   a table: tokens, length, rank, rows
    python benchmarks/scaling.py --quick           a small model and few points
    python benchmarks/scaling.py --two-gigabytes   a training file of 2 GB, made on the fly and deleted
    python benchmarks/scaling.py --json            one JSON object
    python benchmarks/scaling.py --only rows       some of the axes

What is measured, and how: benchmarks/README.md. Models have random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import machine, measured_on, versions

PACKAGES = ("phinetune", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A random Phi-3 under the bundled tokenizer."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocab: int = 4096


MODELS = {
    "tiny": Model(hidden=128, inner=352, layers=2, heads=2),
    "quick": Model(hidden=256, inner=704, layers=4, heads=4),
    "yardstick": Model(hidden=768, inner=2048, layers=12, heads=12, vocab=32_064),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Training steps on made-up rows of one length."""

    model: str
    num_tokens: int
    length: int = 256
    rank: int = 16
    tokens_per_step: int = 4096
    num_warmup_steps: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Road:
    """The whole road from a file of so many rows to an adapter, twice: without and with tokenised data."""

    num_rows: int
    words: int = 12
    num_steps: int = 5


FULL: dict[str, list[Steps] | list[Road]] = {
    "tokens": [Steps(model="tiny", num_tokens=n) for n in (10_000, 30_000, 100_000, 300_000, 1_000_000)],
    "length": [
        Steps(model="yardstick", num_tokens=8192, length=n) for n in (128, 256, 512, 1024, 2048, 4096)
    ],
    "rank": [Steps(model="yardstick", num_tokens=8192, rank=n) for n in (4, 8, 16, 32, 64, 128)],
    "rows": [Road(num_rows=n) for n in (1_000, 10_000, 100_000, 1_000_000)],
}
QUICK: dict[str, list[Steps] | list[Road]] = {
    "tokens": [Steps(model="tiny", num_tokens=n) for n in (10_000, 30_000, 100_000)],
    "length": [Steps(model="quick", num_tokens=8192, length=n) for n in (128, 512, 2048)],
    "rank": [Steps(model="quick", num_tokens=8192, rank=n) for n in (4, 16, 64)],
    "rows": [Road(num_rows=n) for n in (1_000, 10_000)],
}
# About 650 bytes a row.
TWO_GIGABYTES: dict[str, list[Steps] | list[Road]] = {
    "two-gigabytes": [Road(num_rows=1_000, words=100), Road(num_rows=3_250_000, words=100)]
}


def main() -> None:
    options = _options()
    if options.worker:
        print(json.dumps(_worked(json.loads(options.worker), Path(options.folder))))
        return
    grid = TWO_GIGABYTES if options.two_gigabytes else QUICK if options.quick else FULL
    axes = [name for name in grid if not options.only or name in options.only.split(",")]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        result = {axis: _axis(axis, grid[axis], Path(name), options.threads) for axis in axes}
    report = {
        "benchmark": "scaling",
        "quick": options.quick,
        "axes": result,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": machine(options.threads),
        "versions": versions(PACKAGES),
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="cost against work")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small model and few points")
    parser.add_argument("--two-gigabytes", action="store_true", help="only: a training file of 2 GB")
    parser.add_argument("--only", default="", help="axes, with commas between: tokens,length,rank,rows")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _axis(axis: str, cases: Sequence[Steps] | Sequence[Road], folder: Path, threads: int) -> dict[str, Any]:
    """All cases of one axis, and how far their costs are from a straight line."""
    rows = [_run(axis, case, folder, threads) for case in cases]
    return {**_line_of(axis, rows), "rows": rows}


def _run(axis: str, case: Steps | Road, folder: Path, threads: int) -> dict[str, Any]:
    """One case in a process that has held nothing yet; the starter imports no PyTorch."""
    print(f"{axis}: {case} …", file=sys.stderr, flush=True)
    number = str(threads)
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(asdict(case)), "--folder", str(folder)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": number,
            "MKL_NUM_THREADS": number,
            "RAYON_NUM_THREADS": number,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**asdict(case), **result}


def straight_line(work: Sequence[float], cost: Sequence[float]) -> tuple[float, float, float]:
    """Start and slope of the line with the smallest relative errors, and the largest of these errors."""
    import numpy as np

    x, y = np.asarray(work, float), np.asarray(cost, float)
    design = np.stack([1 / y, x / y], axis=1)
    start, slope = np.linalg.lstsq(design, np.ones(len(y)), rcond=None)[0]
    return float(start), float(slope), float(np.max(np.abs((start + slope * x) / y - 1)))


def _line_of(axis: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if axis in ("rows", "two-gigabytes"):
        work = [row["num_rows"] for row in rows]
        cost, unit = [row["rendering_seconds"] for row in rows], "rendering, s"
        beyond = [row["peak_bytes"] - rows[0]["peak_bytes"] for row in rows]
        extra = {"largest_memory_beyond_first": max(beyond)}
    else:
        name = {"tokens": "num_tokens", "length": "length", "rank": "rank"}[axis]
        work = [row[name] for row in rows]
        each = axis != "tokens"
        cost = [row["seconds"] / (row["num_tokens"] if each else 1) for row in rows]
        unit = "s a token" if each else "s"
        extra = {}
    line = {}
    if len(rows) > 2:
        start, slope, deviation = straight_line(work, cost)
        line = {"line_start": start, "line_slope": slope, "largest_deviation": deviation}
    return {"cost": unit, **line, **extra}


def _worked(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """In the case's own process."""
    if "num_rows" in case:
        return _road(Road(**case), folder)
    return _steps(Steps(**case), folder)


def _model(name: str, folder: Path) -> Path:
    """A random model under the bundled tokenizer; made once."""
    import shutil

    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    from phinetune.models.catalog import demo_folder

    target, model = folder / name, MODELS[name]
    if target.exists():
        return target
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=model.vocab, hidden_size=model.hidden, intermediate_size=model.inner,
        num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.heads,
        max_position_embeddings=4096, original_max_position_embeddings=4096, pad_token_id=1, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / file, target / file)
    return target


def _steps(case: Steps, folder: Path) -> dict[str, Any]:
    """Whole training steps: laying out, forward, backward, clipping, update; set-up and warm-up apart."""
    import numpy as np

    from phinetune.data.conversation import Source
    from phinetune.lora.attach import attach
    from phinetune.models.loading import load_base
    from phinetune.models.memory import peak_resident_bytes
    from phinetune.runs.prepare import lora_settings
    from phinetune.text.render import Rendered
    from phinetune.training.loop import start
    from phinetune.training.settings import TrainingSettings
    from phinetune.training.step import train_step

    settings = TrainingSettings(
        finetune_train_seqlen=case.length,
        finetune_train_batch_size=max(1, case.tokens_per_step // case.length),
        lora_r=case.rank,
        lora_alpha=2.0 * case.rank,
        lora_dropout=0.1,
    )
    base = load_base(str(_model(case.model, folder)), device_name="cpu", dtype="bfloat16")
    adapter = attach(base.model, lora_settings(settings), seed=0)
    state = start(base, adapter, settings)
    chance = np.random.default_rng(0)
    per_step = max(1, case.tokens_per_step // case.length)
    num_steps = max(1, round(case.num_tokens / (per_step * case.length)))
    source = Source(file="made up", line=1)
    rows = [
        Rendered(
            ids=chance.integers(0, 4096, case.length).astype(np.int32),
            # A third is trained, as in chats.
            trained=np.arange(case.length) > 2 * case.length // 3,
            source=source,
        )
        for _ in range(per_step)
    ]
    began = 0.0
    for step in range(num_steps + case.num_warmup_steps):
        if step == case.num_warmup_steps:
            began = time.process_time(), time.perf_counter()
        sequences = [(row,) for row in range(per_step)]
        train_step(base, adapter, state.optimizer, rows, sequences, settings, dropout_seed=step, step=step)
    seconds, wall_seconds = time.process_time() - began[0], time.perf_counter() - began[1]
    num_tokens = num_steps * per_step * case.length
    return {
        "num_tokens": num_tokens,
        "seconds": seconds,
        "wall_seconds": wall_seconds,
        "microseconds_per_token": 1e6 * seconds / num_tokens,
        "peak_bytes": peak_resident_bytes(),
    }


def _road(case: Road, folder: Path) -> dict[str, Any]:
    from phinetune.base.events import Stepped
    from phinetune.models.memory import peak_resident_bytes
    from phinetune.runs.prepare import prepare
    from phinetune.runs.project import SETTINGS_FILE
    from phinetune.runs.rendering import cache_bytes
    from phinetune.runs.train_run import train_run
    from phinetune.training.lora_yaml import lora_yaml
    from phinetune.training.settings import TrainingSettings

    with tempfile.TemporaryDirectory(dir=folder) as name:
        project = Path(name)
        (project / "dataset").mkdir()
        _write_chats(project / "dataset" / "test.jsonl", 32, case.words)
        size_bytes = _write_chats(project / "dataset" / "train.jsonl", case.num_rows, case.words)
        settings = TrainingSettings(
            model=str(_model("tiny", folder)),
            finetune_dataset="dataset",
            finetune_train_nsamples=2_000_000_000,  # every row takes part
            finetune_train_seqlen=1024,
            num_training_steps=case.num_steps,
            eval_steps=case.num_steps,
            save_steps=case.num_steps,
            compare_nsamples=0,
            device="cpu",
            dtype="bfloat16",
        )
        (project / SETTINGS_FILE).parent.mkdir()
        (project / SETTINGS_FILE).write_text(lora_yaml(settings), encoding="utf-8")
        before, began, began_cpu = peak_resident_bytes(), time.perf_counter(), time.process_time()
        prepared = prepare(project, settings)
        rendering_cpu, rendering = time.process_time() - began_cpu, time.perf_counter() - began
        num_tokens = prepared.plan.train.num_tokens
        del prepared
        after_rendering, began, first = peak_resident_bytes(), time.perf_counter(), 0.0
        for event in train_run(project, run_name="run"):
            if isinstance(event, Stepped) and not first:
                first = time.perf_counter() - began
        return {
            "file_bytes": size_bytes,
            "num_training_tokens": num_tokens,
            "rendering_seconds": rendering_cpu,
            "rendering_wall_seconds": rendering,
            "rows_per_second": case.num_rows / rendering_cpu,
            "cached_first_step_wall_seconds": first,
            "cache_bytes": cache_bytes(project),
            "peak_bytes_before": before,
            "peak_bytes_rendering": after_rendering,
            "peak_bytes": peak_resident_bytes(),
        }


def _write_chats(path: Path, num_rows: int, words: int) -> int:
    """Chats of two to one question and answer, drawn anew for every row; returns the size in bytes."""
    chance = random.Random(path.stem)
    syllables = ["ka", "lo", "mi", "ten", "ra", "su", "vel", "dor", "pin", "ash"]
    names = [first + second for first in syllables for second in syllables]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            text = chance.choices(names, k=words)
            asked, answer = " ".join(text[: 2 * words // 3]), " ".join(text[2 * words // 3 :])
            file.write(
                f'{{"messages": [{{"role": "user", "content": "{asked}"}}, '
                f'{{"role": "assistant", "content": "{answer}"}}]}}\n'
            )
    return path.stat().st_size


def _print(report: dict[str, Any]) -> None:
    print(f"{measured_on(report)}\n")
    for axis, result in report["axes"].items():
        print(axis, f"({result['cost']})")
        for row in result["rows"]:
            if "num_rows" in row:
                print(
                    f"  {row['num_rows']:>9,} rows {row['file_bytes'] / 1e6:8.1f} MB  "
                    f"{row['rows_per_second']:8.0f} rows/s  first step from the cache "
                    f"{row['cached_first_step_wall_seconds']:6.1f} s  peak {row['peak_bytes'] / 1e6:7.0f} MB"
                )
            else:
                print(
                    f"  {row['num_tokens']:>9,} tokens  length {row['length']:>5}  rank {row['rank']:>4}  "
                    f"{row['microseconds_per_token']:8.1f} us a token  peak {row['peak_bytes'] / 1e6:7.0f} MB"
                )
        for name, text in (
            ("largest_deviation", "largest deviation from a straight line {:.1%}"),
            ("largest_memory_beyond_first", "memory beyond the first case {:,.0f} bytes"),
        ):
            if name in result:
                print("  " + text.format(result[name]))


if __name__ == "__main__":
    main()
