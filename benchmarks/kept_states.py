"""What keeping the states below the first adapted block buys in training, against computing them each time.

    python benchmarks/kept_states.py            768 x 12, the two top blocks adapted
    python benchmarks/kept_states.py --json     one JSON object
    python benchmarks/kept_states.py --blocks 4

The random model of `train_cpu.py` and the rows of `shared_prefix.py`. Both ways make the same updates in
one process, by turns. The pass that makes the states is timed by itself: it pays back after an epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine, measured_on, versions
from shared_prefix import Turn, made_up, one_turn
from train_cpu_work import LAYERS, TARGETS, Work, prepare

from phinetune.lora.attach import LoraSettings, attach
from phinetune.models.loading import load_base
from phinetune.models.lower_states import first_trained_block, lower_states, states_bytes

ROWS_PER_STEP, NUM_STEPS, NUM_TURNS = 32, 3, 2


def main() -> None:
    parser = argparse.ArgumentParser(description="states below the adapted blocks, kept or computed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--blocks", type=int, default=2, help="adapted blocks, counted from the top")
    options = parser.parse_args()
    report = measured(options.blocks)
    print(json.dumps(report, indent=2) if options.json else table(report))


def measured(num_blocks: int) -> dict[str, Any]:
    work = Work(num_steps=1, rows_per_step=1)
    rows = made_up(60, ROWS_PER_STEP * NUM_STEPS, work.seed)
    steps = [list(range(n, n + ROWS_PER_STEP)) for n in range(0, len(rows), ROWS_PER_STEP)]
    with tempfile.TemporaryDirectory(prefix="kept-states-") as name:
        folder = Path(name)
        work.write(folder)
        prepare(folder)
        plain = load_base(str(folder / "model"), device_name="cpu")
        lora = LoraSettings(
            rank=work.rank,
            alpha=work.alpha,
            dropout=work.dropout,
            target_modules=TARGETS,
            layers_to_transform=tuple(range(LAYERS - num_blocks, LAYERS)),
        )
        adapter = attach(plain.model, lora, seed=0)
        first_block = first_trained_block(plain)
        start, cpu_start = time.perf_counter(), time.process_time()
        states = lower_states(plain, first_block, rows, folder / "states")
        made_s, made_cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        bases = {True: dataclasses.replace(plain, lower=states), False: plain}
        first = adapter.snapshot()
        turns: dict[bool, list[Turn]] = {True: [], False: []}
        for _ in range(NUM_TURNS):
            for is_kept, base in bases.items():
                adapter.restore(first)
                turns[is_kept].append(one_turn(base, adapter, rows, steps, work))
    rate = {way: statistics.median(t.tokens_per_second for t in turns[way]) for way in turns}
    cpu_rate = {way: statistics.median(t.tokens_per_cpu_second for t in turns[way]) for way in turns}
    num_tokens = sum(row.num_tokens for row in rows)
    return {
        "ratio": rate[True] / rate[False],
        "cpu_ratio": cpu_rate[True] / cpu_rate[False],
        "kept_tokens_per_second": rate[True],
        "computed_tokens_per_second": rate[False],
        "making_tokens_per_second": num_tokens / made_s,
        "making_tokens_per_cpu_second": num_tokens / made_cpu_s,
        "bytes_per_token": states_bytes(plain, rows) / num_tokens,
        "adapted_blocks": num_blocks,
        "last_losses": [turns[way][0].losses[-1] for way in (True, False)],
        "compute": plain.compute.reason,
        "machine": machine(torch.get_num_threads()),
        "versions": versions(("phinetune", "torch", "transformers")),
    }


def table(report: dict[str, Any]) -> str:
    return (
        f"{measured_on(report)}; {report['compute']}\n"
        f"{report['adapted_blocks']} of {LAYERS} blocks adapted, "
        f"{report['bytes_per_token']:.0f} bytes a token\n\n"
        f"tokens per second          kept {report['kept_tokens_per_second']:.0f}, "
        f"computed {report['computed_tokens_per_second']:.0f}, ratio {report['ratio']:.2f} "
        f"({report['cpu_ratio']:.2f} by CPU seconds)\n"
        f"making the states          {report['making_tokens_per_second']:.0f} tokens/s\n"
        f"loss of the last update    kept {report['last_losses'][0]:.4f}, "
        f"computed {report['last_losses'][1]:.4f}"
    )


if __name__ == "__main__":
    main()
