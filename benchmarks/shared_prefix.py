"""What computing a common system prompt once a batch buys in training, against computing it for each row.

    python benchmarks/shared_prefix.py            768 x 12, a table
    python benchmarks/shared_prefix.py --json     one JSON object
    python benchmarks/shared_prefix.py --quick    a smaller run

The random model of `train_cpu.py` and made-up chats of a help desk: a system prompt of 60 tokens, questions
of 10 to 18, answers of about 42. Both ways make the same updates on the same rows in one process, by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, measured_on, versions
from train_cpu_work import PAD, Work, prepare

from phinetune.data.conversation import Source
from phinetune.lora.attach import Adapter
from phinetune.lora.files import load_adapter
from phinetune.models import shared_prefixes
from phinetune.models.batch import PackedBatch
from phinetune.models.loading import Base, load_base
from phinetune.text.render import Rendered
from phinetune.training.optimizers import make_optimizer
from phinetune.training.settings import TrainingSettings
from phinetune.training.step import train_step

# Three chats of a published sample for help desks: prompts of 58 tokens, questions of 7 to 12 with 7 of the
# template, answers of 36 to 46.
QUESTION = (10, 18)
ANSWER_MEDIAN, ANSWER_SIGMA = 42, 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """Rows of an update; updates of a turn, of which the first is not counted; turns."""

    num_layers: int
    rows_per_step: int
    num_steps: int
    num_turns: int


FULL = Length(num_layers=12, rows_per_step=32, num_steps=3, num_turns=3)
QUICK = Length(num_layers=4, rows_per_step=16, num_steps=3, num_turns=2)


def main() -> None:
    parser = argparse.ArgumentParser(description="a shared system prompt computed once, or for each row")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    parser.add_argument("--prefix", type=int, default=60, help="tokens of the system prompt")
    parser.add_argument("--rows", type=int, default=0, help="rows of an update")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    length = QUICK if options.quick else FULL
    report = measured(length, options.prefix, options.rows or length.rows_per_step)
    print(json.dumps(report, indent=2) if options.json else table(report))


def measured(length: Length, num_shared: int, rows_per_step: int) -> dict[str, Any]:
    work = Work(num_steps=1, rows_per_step=1, num_layers=length.num_layers)
    with tempfile.TemporaryDirectory(prefix="shared-prefix-") as name:
        folder = Path(name)
        work.write(folder)
        prepare(folder)
        base = load_base(str(folder / "model"), device_name="cpu")
        adapter = load_adapter(base.model, folder / "adapter")
    rows = made_up(num_shared, rows_per_step * length.num_steps, work.seed)
    steps = [list(range(n, n + rows_per_step)) for n in range(0, len(rows), rows_per_step)]
    first = adapter.snapshot()
    turns: dict[bool, list[Turn]] = {True: [], False: []}
    for number in range(length.num_turns):
        for is_shared in turns if number % 2 else reversed(turns):
            adapter.restore(first)
            with sharing(is_shared):
                turns[is_shared].append(one_turn(base, adapter, rows, steps, work))
            way = "shared" if is_shared else "each row"
            turn = turns[is_shared][-1]
            print(f"{way:<10}{turn.tokens_per_second:6.0f} tokens/s", file=sys.stderr)
    on, off = (statistics.median(t.tokens_per_second for t in turns[way]) for way in (True, False))
    cpu_on, cpu_off = (
        statistics.median(t.tokens_per_cpu_second for t in turns[way]) for way in (True, False)
    )
    computed = [PackedBatch.lay([rows[r] for r in step], shares_prefixes=True).num_tokens for step in steps]
    return {
        "ratio": on / off,
        "cpu_ratio": cpu_on / cpu_off,
        "shared_tokens_per_second": on,
        "each_tokens_per_second": off,
        "prefix_tokens": num_shared,
        "rows_per_step": rows_per_step,
        "mean_row_tokens": statistics.mean(row.num_tokens for row in rows),
        "computed_share": sum(computed) / sum(row.num_tokens for row in rows),
        "first_losses": [turns[way][0].losses[0] for way in (True, False)],
        "last_losses": [turns[way][0].losses[-1] for way in (True, False)],
        "compute": base.compute.reason,
        "machine": machine(torch.get_num_threads()),
        "versions": versions(("phinetune", "torch", "transformers")),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Tokens are those of the rows, however few are computed. CPU seconds suffer less from other programs."""

    tokens_per_second: float
    tokens_per_cpu_second: float
    losses: list[float]


def one_turn(base: Base, adapter: Adapter, rows: list[Rendered], steps: list[list[int]], work: Work) -> Turn:
    """All updates, the first of which is not counted."""
    settings = TrainingSettings(
        varied_seqlen=True,
        finetune_train_batch_size=len(steps[0]),
        learning_rate=work.learning_rate,
        lora_dropout=work.dropout,
    )
    optimizer = make_optimizer(adapter, settings)
    base.model.train()
    losses, num_tokens, seconds, cpu_seconds = [], 0, 0.0, 0.0
    for number, step in enumerate(steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        result = train_step(
            base,
            adapter,
            optimizer,
            rows,
            [(row,) for row in step],
            settings,
            dropout_seed=number,
            step=number + 1,
        )
        losses.append(result.loss)
        if number:
            seconds += time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu_start
            num_tokens += result.num_tokens
    return Turn(
        tokens_per_second=num_tokens / seconds,
        tokens_per_cpu_second=num_tokens / cpu_seconds,
        losses=losses,
    )


def made_up(num_shared: int, num_rows: int, seed: int) -> list[Rendered]:
    """Chats of a help desk: random tokens, the answer is trained."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(3, PAD, num_shared)
    rows = []
    for line in range(1, num_rows + 1):
        num_question = int(rng.integers(QUESTION[0], QUESTION[1] + 1))
        num_answer = max(4, int(ANSWER_MEDIAN * np.exp(rng.normal(0, ANSWER_SIGMA))))
        ids = np.concatenate([prompt, rng.integers(3, PAD, num_question + num_answer)]).astype(np.int32)
        trained = np.arange(len(ids)) >= num_shared + num_question
        rows.append(Rendered(ids=ids, trained=trained, source=Source(file="made-up", line=line)))
    return rows


@contextlib.contextmanager
def sharing(is_on: bool) -> Iterator[None]:
    before = shared_prefixes.MIN_SHARED_TOKENS
    shared_prefixes.MIN_SHARED_TOKENS = before if is_on else 1 << 30
    try:
        yield
    finally:
        shared_prefixes.MIN_SHARED_TOKENS = before


def table(report: dict[str, Any]) -> str:
    return (
        f"{measured_on(report)}; {report['compute']}\n"
        f"{report['rows_per_step']} rows an update of {report['mean_row_tokens']:.0f} tokens, of which "
        f"{report['prefix_tokens']} are common; {report['computed_share']:.0%} of all are computed\n\n"
        f"tokens of rows per second  shared {report['shared_tokens_per_second']:.0f}, "
        f"each row {report['each_tokens_per_second']:.0f}, ratio {report['ratio']:.2f} "
        f"({report['cpu_ratio']:.2f} by CPU seconds)\n"
        f"loss of the first update   shared {report['first_losses'][0]:.4f}, "
        f"each row {report['first_losses'][1]:.4f}\n"
        f"loss of the last update    shared {report['last_losses'][0]:.4f}, "
        f"each row {report['last_losses'][1]:.4f} (other dropout masks)"
    )


if __name__ == "__main__":
    main()
