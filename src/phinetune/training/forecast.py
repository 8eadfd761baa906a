"""Forecast a training: its time, by timing a short piece of the real work, and its memory, by counting.

Leaves weights, gradients and random numbers as they were. Knows nothing of files, or of the comparison
that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from phinetune.lora.attach import Adapter
from phinetune.models.batch import PackedBatch
from phinetune.models.loading import Base
from phinetune.models.loss import token_scores, trained_token_loss
from phinetune.models.memory import Costs, StepShape, held_bytes, release_unused, saved_bytes
from phinetune.models.timing import LONG_PROBE_S, NUM_TIMED, seconds_of
from phinetune.text.render import Rendered
from phinetune.text.row_files import num_tokens_in, num_trained_in
from phinetune.training.distributed import ALONE, Ranks
from phinetune.training.optimizers import NUM_MOMENTS
from phinetune.training.packing import Rows, batches
from phinetune.training.plan import Plan
from phinetune.training.settings import TrainingSettings
from phinetune.training.step import pieces

PROBE_TOKENS = 1024
# Of a step's time, what gradient checkpointing does once more: a quarter to two fifths (docs/forecast.md).
FORWARD_SHARE = 1 / 3
# Comparing the beginnings of rows takes about 5 us each, and a forecast is made for many settings.
MOST_COMPARED_ROWS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A run from its first step to its proof.

    `seconds` is training with its evaluations; `peak_memory_bytes` the most held in the whole run, by the
    process on a CPU, by the allocator on a GPU. `memory` names its parts.
    """

    seconds: float
    comparison_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    available_bytes: int
    memory: Mapping[str, int]

    @property
    def total_seconds(self) -> float:
        return self.seconds + self.comparison_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a short piece of the work took: seconds per token, and what was held right after it."""

    train_s: float
    test_s: float
    costs: Costs
    held_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBytes:
    """The most that each part of a training holds beside what was held before it."""

    kept: float
    step: float
    evaluation: float
    saving: float

    @property
    def most(self) -> float:
        return self.kept + max(self.step, self.evaluation, self.saving)


def probe(
    base: Base,
    adapter: Adapter,
    settings: TrainingSettings,
    sequences: Sequence[Rows],
    rows: Sequence[Rendered],
    ranks: Ranks = ALONE,
) -> Probe:
    """Time a piece of up to `PROBE_TOKENS` tokens, and measure what a token holds until its backward pass.

    The `ranks` of a divided base must all call this; each measures its own part.
    """
    batch = _probe_batches(sequences, rows, PROBE_TOKENS // 4, base.device)[0]
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        was_training = base.model.training
        base.model.train()
        saved = saved_bytes(base, lambda: trained_token_loss(base, batch))
        base.model.train(was_training)
    costs = Costs.of(
        base,
        0.0,
        num_adapter_parameters=adapter.num_stored,
        num_moments=NUM_MOMENTS[settings.optimizer],
    )
    saved = max(0, saved - adapter.copied_bytes(base.dtype))  # these do not grow with the tokens
    costs = replace(costs, saved_per_token=saved / costs.filled(batch.num_tokens))
    train_s, test_s = _seconds_per_token(base, adapter, sequences, rows, ranks)
    release_unused()
    return Probe(train_s=train_s, test_s=test_s, costs=costs, held_bytes=held_bytes(base.device))


def training_seconds(probe: Probe, settings: TrainingSettings, plan: Plan, num_ranks: int = 1) -> float:
    """All steps and all evaluations, divided among so many processes."""
    tokens_per_step = plan.train.num_tokens / plan.steps_per_epoch
    again = FORWARD_SHARE if settings.gradient_checkpointing else 0
    steps_s = plan.num_steps * tokens_per_step * probe.train_s * (1 + again)
    evaluations_s = num_evaluations(settings, plan) * plan.test.num_tokens * probe.test_s
    return (steps_s + evaluations_s) / num_ranks


def num_evaluations(settings: TrainingSettings, plan: Plan) -> int:
    """How often the test loss is measured, the base's included."""
    return len(plan.evaluation_steps) + (settings.evaluation_strategy != "no")


def training_bytes(
    costs: Costs,
    settings: TrainingSettings,
    train: tuple[Sequence[Rows], Sequence[Rendered]],
    test: tuple[Sequence[Rows], Sequence[Rendered]],
) -> TrainingBytes:
    """Count the largest piece of a step and of an evaluation over the sequences of these rows."""
    train_sequences, train_rows = train
    test_sequences, test_rows = test
    groups = batches(train_sequences, settings.effective_batch_size)
    is_checkpointed = settings.gradient_checkpointing
    steps = _shapes(groups, train_rows, settings.train_batch_size, costs.is_cpu)
    tests = _shapes([test_sequences], test_rows, settings.test_batch_size, costs.is_cpu)
    return TrainingBytes(
        kept=costs.kept(),
        step=max(costs.step(shape, is_checkpointed=is_checkpointed) for shape in steps),
        evaluation=max(costs.evaluation(shape) for shape in tests),
        saving=costs.saving(),
    )


def _shapes(
    groups: Iterable[Sequence[Rows]], rows: Sequence[Rendered], batch_size: int, is_cpu: bool
) -> set[StepShape]:
    """The pieces that occur; few of them differ. Of many rows no beginnings are compared: it is a bound."""
    is_exact = len(rows) <= MOST_COMPARED_ROWS
    return {
        StepShape.of([rows[row] for row in piece]) if is_exact else _shape_of_lengths(rows, piece)
        for group in groups
        for piece in pieces(group, rows, batch_size, is_cpu, counts_all=not is_exact)
    }


def _shape_of_lengths(rows: Sequence[Rendered], piece: Sequence[int]) -> StepShape:
    return StepShape(
        num_tokens=num_tokens_in(rows, piece),
        num_trained_tokens=num_trained_in(rows, piece),
        longest_segment=max(num_tokens_in(rows, (row,)) for row in piece),
    )


def _probe_batches(
    sequences: Sequence[Rows], rows: Sequence[Rendered], most_tokens: int, device: torch.device
) -> list[PackedBatch]:
    """The first rows in batches of up to `most_tokens` tokens: the probe's set-up, and what is timed."""
    found: list[list[Rendered]] = [[]]
    for row in (rows[row] for sequence in sequences for row in sequence):
        if found[-1] and StepShape.of([*found[-1], row]).num_tokens > most_tokens:
            if len(found) == 1 + NUM_TIMED:
                break
            found.append([])
        found[-1].append(row)
    return [PackedBatch.lay(batch, device, shares_prefixes=True) for batch in found]


def _seconds_per_token(
    base: Base, adapter: Adapter, sequences: Sequence[Rows], rows: Sequence[Rendered], ranks: Ranks
) -> tuple[float, float]:
    """Seconds per token of forward and backward, and of evaluation."""
    found = _probe_batches(sequences, rows, PROBE_TOKENS, base.device)

    def trained(batch: PackedBatch) -> None:
        loss, _ = trained_token_loss(base, batch)
        loss.backward()

    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        was_training = base.model.training
        base.model.train()
        train_s = _timed(trained, found, base.device, ranks)
        base.model.eval()
        test_s = _timed(lambda batch: token_scores(base, batch), found, base.device, ranks)
        base.model.train(was_training)
    for parameter in adapter.parameters():
        parameter.grad = None
    return train_s, test_s


def _timed(
    work: Callable[[PackedBatch], object], found: Sequence[PackedBatch], device: torch.device, ranks: Ranks
) -> float:
    """Seconds per token of the rows, over different batches: a CPU prepares for new shapes again and again.

    The first pays for set-up and counts only when it is alone or long.
    """
    took = []
    for batch in found:
        took.append((seconds_of(partial(work, batch), device), batch.num_example_tokens))
        if ranks.agreed(took[-1][0] > LONG_PROBE_S):
            break
    counted = took[1:] or took
    return sum(seconds for seconds, _ in counted) / sum(num_tokens for _, num_tokens in counted)
