"""Forecast a run's time, by timing a short piece of the real work, and its peak memory, by counting.

Leaves weights, gradients and random numbers as they were. Knows nothing of files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from phinetune.lora.attach import Adapter
from phinetune.models.batch import PackedBatch
from phinetune.models.loading import Base
from phinetune.models.loss import token_scores, trained_token_loss
from phinetune.models.memory import StepShape, forecast_bytes
from phinetune.text.render import Rendered
from phinetune.training.distributed import ALONE, Ranks
from phinetune.training.packing import Rows, batches, epoch_sequences
from phinetune.training.plan import Plan, train_sampling
from phinetune.training.settings import TrainingSettings
from phinetune.training.step import pieces

PROBE_TOKENS = 1024
LONG_PROBE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Training with its evaluations: seconds, and the most memory held."""

    seconds: float
    peak_memory_bytes: int
    tokens_per_second: float


def forecast(
    base: Base,
    adapter: Adapter,
    settings: TrainingSettings,
    plan: Plan,
    train_rows: Sequence[Rendered],
    ranks: Ranks = ALONE,
) -> Forecast:
    """Time a piece of up to `PROBE_TOKENS` tokens; count the memory of the largest piece.

    With several `ranks` the time is of all together, the memory of one. Those of a divided base must
    all call this.
    """
    lengths = [row.num_tokens for row in train_rows]
    sequences = epoch_sequences(plan.rows, lengths, train_sampling(settings), 0)
    train_seconds, test_seconds = _seconds_per_token(base, adapter, sequences, train_rows, ranks)
    tokens_per_step = plan.train.num_tokens / plan.steps_per_epoch
    num_evaluations = len(plan.evaluation_steps) + (settings.evaluation_strategy != "no")
    train_tokens, test_tokens = plan.num_steps * tokens_per_step, num_evaluations * plan.test.num_tokens
    return Forecast(
        seconds=(train_tokens * train_seconds + test_tokens * test_seconds) / ranks.size,
        peak_memory_bytes=forecast_bytes(
            base, adapter.num_parameters, _largest_piece(base, settings, sequences, train_rows)
        ),
        tokens_per_second=ranks.size / train_seconds,
    )


def _seconds_per_token(
    base: Base, adapter: Adapter, sequences: Sequence[Rows], rows: Sequence[Rendered], ranks: Ranks
) -> tuple[float, float]:
    """Seconds per token of forward and backward, and of evaluation."""
    chosen: list[Rendered] = []
    for row in (row for sequence in sequences for row in sequence):
        if chosen and sum(r.num_tokens for r in chosen) + rows[row].num_tokens > PROBE_TOKENS:
            break
        chosen.append(rows[row])
    batch = PackedBatch.lay(chosen, base.device)

    def trained() -> None:
        loss, _ = trained_token_loss(base, batch)
        loss.backward()

    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        was_training = base.model.training
        base.model.train()
        train_s = _timed(trained, base.device, ranks)
        base.model.eval()
        test_s = _timed(lambda: token_scores(base, batch), base.device, ranks)
        base.model.train(was_training)
    for parameter in adapter.parameters():
        parameter.grad = None
    return train_s / batch.num_tokens, test_s / batch.num_tokens


def _timed(work: object, device: torch.device, ranks: Ranks) -> float:
    """Seconds of the second call, as the first pays for set-up; of the first when that is long."""
    assert callable(work)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        is_long = seconds > LONG_PROBE_S
        if ranks.any(is_long) if ranks.is_sharded else is_long:
            break
    return seconds


def _largest_piece(
    base: Base, settings: TrainingSettings, sequences: Sequence[Rows], rows: Sequence[Rendered]
) -> StepShape:
    is_cpu = base.device.type == "cpu"
    found = [
        [rows[row] for row in piece]
        for group in batches(sequences, settings.effective_batch_size)
        for piece in pieces(group, rows, settings.finetune_train_batch_size, is_cpu)
    ]
    largest = max(found, key=lambda piece: sum(row.num_tokens for row in piece))
    return StepShape(
        num_tokens=sum(row.num_tokens for row in largest),
        num_trained_tokens=sum(row.num_trained for row in largest),
        longest_segment=max(row.num_tokens for row in largest),
        has_dropout=settings.lora_dropout > 0,
        is_checkpointed=settings.gradient_checkpointing,
    )
