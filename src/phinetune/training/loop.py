"""The training loop: a generator of events over one adapter on one base.

It prints nothing and writes no files: when a checkpoint is due it says so and its caller saves
`TrainState`. Knows nothing of run folders, terminals or where the examples came from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from phinetune.base.errors import DivergedError
from phinetune.base.events import Evaluated, Event, SaveDue, Stepped, Trained
from phinetune.base.seeds import derive
from phinetune.lora.attach import Adapter
from phinetune.models.loading import Base
from phinetune.models.memory import peak_bytes
from phinetune.text.render import Rendered
from phinetune.training.packing import Rows, batches, epoch_sequences
from phinetune.training.plan import Plan, train_sampling
from phinetune.training.schedule import learning_rate_factor
from phinetune.training.settings import TrainingSettings
from phinetune.training.step import make_optimizer, train_step
from phinetune.training.validation import validate


@dataclass(kw_only=True)
class TrainState:
    """All that changes while training; everything else is derived from settings, seed and step."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    num_evaluations_without_improvement: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0


def start(base: Base, adapter: Adapter, settings: TrainingSettings) -> TrainState:
    """The state before the first step; switches the model to training."""
    base.model.train()
    if settings.gradient_checkpointing:
        # transformers renamed it on the way to version 6; the argument has the same place in both.
        enable = getattr(base.model, "activation_checkpointing_enable", None)
        (enable or base.model.gradient_checkpointing_enable)({"use_reentrant": False})
    return TrainState(adapter=adapter, optimizer=make_optimizer(adapter, settings))


def train(
    base: Base,
    state: TrainState,
    settings: TrainingSettings,
    plan: Plan,
    train_rows: Sequence[Rendered],
    test_rows: Sequence[Rendered],
) -> Iterator[Event]:
    """Train until the planned steps are done or the test loss stops improving.

    Yields `Stepped`, `Evaluated`, `SaveDue` and at last `Trained`, when the best weights are back in
    the model. Raises `DivergedError` with the weights of the last finite step in place.
    """
    began = time.perf_counter()
    stopped_because = "all steps done"
    if settings.evaluation_strategy != "no":
        yield _evaluate(base, state, settings, plan, test_rows)
    for sequences in _steps_of_work(state, settings, plan, train_rows):
        yield _step(base, state, settings, plan, train_rows, sequences)
        if state.step in plan.evaluation_steps:
            yield _evaluate(base, state, settings, plan, test_rows)
        if state.step in plan.save_steps:
            yield SaveDue(step=state.step)
        if state.num_evaluations_without_improvement >= settings.early_stopping_patience:
            stopped_because = (
                f"no lower test loss in {settings.early_stopping_patience} evaluations "
                f"(early_stopping_patience)"
            )
            break
    state.adapter.restore(state.best_weights)
    base.model.eval()
    yield Trained(
        stopped_because=stopped_because,
        num_steps=state.step,
        best_step=state.best_step,
        seconds=time.perf_counter() - began,
        num_tokens=state.num_tokens,
        num_trained_tokens=state.num_trained_tokens,
        peak_memory_bytes=peak_bytes(base.device),
    )


def _steps_of_work(
    state: TrainState, settings: TrainingSettings, plan: Plan, rows: Sequence[Rendered]
) -> Iterator[list[Rows]]:
    """The sequences of each step still to do, epoch after epoch."""
    lengths = [row.num_tokens for row in rows]
    sampling = train_sampling(settings)
    first = 0
    epoch = 0
    while first < plan.num_steps:
        sequences = epoch_sequences(plan.rows, lengths, sampling, epoch)
        work = list(batches(sequences, settings.effective_batch_size))
        for number, chosen in enumerate(work, start=first):
            if state.step <= number < plan.num_steps:
                yield chosen
        first += len(work)
        epoch += 1


def _step(
    base: Base,
    state: TrainState,
    settings: TrainingSettings,
    plan: Plan,
    rows: Sequence[Rendered],
    sequences: list[Rows],
) -> Stepped:
    began = time.perf_counter()
    rate = settings.learning_rate * learning_rate_factor(
        state.step, plan.num_steps, settings.lr_scheduler_type, settings.num_warmup_steps
    )
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    result = train_step(
        base,
        state.adapter,
        state.optimizer,
        rows,
        sequences,
        settings,
        dropout_seed=derive(settings.seed, "dropout", state.step),
        step=state.step + 1,
    )
    state.step += 1
    state.num_tokens += result.num_tokens
    state.num_trained_tokens += result.num_trained_tokens
    return Stepped(
        step=state.step,
        num_steps=plan.num_steps,
        epoch=state.step / plan.steps_per_epoch,
        loss=result.loss,
        learning_rate=rate,
        grad_norm=result.grad_norm,
        num_tokens=result.num_tokens,
        num_trained_tokens=result.num_trained_tokens,
        seconds=time.perf_counter() - began,
    )


def _evaluate(
    base: Base, state: TrainState, settings: TrainingSettings, plan: Plan, rows: Sequence[Rendered]
) -> Evaluated:
    """Measure the test loss; keep the weights if it is the lowest so far. Step 0 is the base model."""
    began = time.perf_counter()
    result = validate(base, rows, plan.test_sequences, settings)
    if not math.isfinite(result.loss):
        raise DivergedError(
            "the test loss is not finite",
            where=f"step {state.step}",
            why="the adapter's weights have grown beyond what the base can bear",
            do="lower learning_rate, or raise num_warmup_steps",
        )
    is_best = state.step > 0 and result.loss < state.best_loss
    if is_best:
        state.best_step, state.best_loss = state.step, result.loss
        state.best_weights = state.adapter.snapshot()
        state.num_evaluations_without_improvement = 0
    elif state.step > 0:
        state.num_evaluations_without_improvement += 1
    return Evaluated(
        step=state.step,
        epoch=state.step / plan.steps_per_epoch,
        loss=result.loss,
        token_accuracy=result.token_accuracy,
        num_trained_tokens=result.num_trained_tokens,
        is_best=is_best,
        seconds=time.perf_counter() - began,
    )
