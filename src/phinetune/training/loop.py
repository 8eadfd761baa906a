"""The training loop: a generator of events over one adapter on one base.

It prints nothing and writes no files: when a checkpoint is due it says so and its caller saves
`TrainState`. Knows nothing of run folders, terminals or where the examples came from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch

from phinetune.base.errors import DivergedError, SpaceError
from phinetune.base.events import Evaluated, Event, SaveDue, Stepped, Trained, Warned
from phinetune.base.seeds import derive
from phinetune.lora.attach import Adapter
from phinetune.models.loading import Base
from phinetune.models.memory import peak_bytes
from phinetune.text.render import Rendered
from phinetune.training.distributed import ALONE, Ranks
from phinetune.training.optimizers import make_optimizer
from phinetune.training.packing import Rows, batches, epoch_sequences
from phinetune.training.plan import Plan
from phinetune.training.schedule import learning_rate_factor
from phinetune.training.settings import TrainingSettings
from phinetune.training.state import TrainState
from phinetune.training.step import most_rows, train_step
from phinetune.training.validation import validate


def start(base: Base, adapter: Adapter, settings: TrainingSettings) -> TrainState:
    """The state before the first step; switches the model to training."""
    base.model.train()
    if settings.gradient_checkpointing:
        # transformers renamed it on the way to version 6; the argument has the same place in both.
        enable = getattr(base.model, "activation_checkpointing_enable", None)
        (enable or base.model.gradient_checkpointing_enable)({"use_reentrant": False})
        # Else embeddings ask for gradients, which then pass through every block below the first adapted one.
        base.model.disable_input_require_grads()
    return TrainState(adapter=adapter, optimizer=make_optimizer(adapter, settings))


def train(
    base: Base,
    state: TrainState,
    settings: TrainingSettings,
    plan: Plan,
    train_rows: Sequence[Rendered],
    test_rows: Sequence[Rendered],
    ranks: Ranks = ALONE,
) -> Iterator[Event]:
    """Train until the planned steps are done or the test loss stops improving.

    Goes on from wherever `state` is. With several `ranks`, each runs this on the same state and rows,
    and yields the same events. Yields `Stepped`, `Evaluated`, `SaveDue`, `Warned` and at last
    `Trained`, when the best weights are back in the model; at any event `state` may be saved. Raises
    `DivergedError` with the weights of the last finite step in place.
    """
    work = _steps_of_work(state, settings, plan)
    stopped_because = "all steps done"
    while True:
        if state.settled_step < state.step:
            yield from _settle(base, state, settings, plan, test_rows, ranks)
        if state.num_evaluations_without_improvement >= settings.early_stopping_patience:
            stopped_because = (
                f"no lower test loss in {settings.early_stopping_patience} evaluations "
                f"(early_stopping_patience)"
            )
            break
        sequences = next(work, None)
        if sequences is None:
            break
        yield from _step(base, state, settings, plan, train_rows, sequences, ranks)
    state.adapter.restore(state.best_weights)
    base.model.eval()
    yield Trained(
        stopped_because=stopped_because,
        num_steps=state.step,
        best_step=state.best_step,
        seconds=state.seconds,
        num_tokens=state.num_tokens,
        num_trained_tokens=state.num_trained_tokens,
        peak_memory_bytes=ranks.highest(peak_bytes(base.device)),
    )


def _settle(
    base: Base,
    state: TrainState,
    settings: TrainingSettings,
    plan: Plan,
    test_rows: Sequence[Rendered],
    ranks: Ranks,
) -> Iterator[Event]:
    """The evaluation and the checkpoint that are due after a step; at step 0 the base is measured."""
    is_base = state.step == 0 and settings.evaluation_strategy != "no"
    if is_base or state.step in plan.evaluation_steps:
        yield _evaluate(base, state, settings, plan, test_rows, ranks)
    state.settled_step = state.step
    if state.step in plan.save_steps:
        yield SaveDue(step=state.step)


def _steps_of_work(state: TrainState, settings: TrainingSettings, plan: Plan) -> Iterator[list[Rows]]:
    """The sequences of each step still to do, epoch after epoch."""
    first = 0
    epoch = 0
    while first < plan.num_steps:
        sequences = epoch_sequences(plan.train_sequences, seed=settings.seed, epoch=epoch)
        for chosen in batches(sequences, settings.effective_batch_size):
            if state.step <= first < plan.num_steps:
                yield chosen
            first += 1
        epoch += 1


def _step(
    base: Base,
    state: TrainState,
    settings: TrainingSettings,
    plan: Plan,
    rows: Sequence[Rendered],
    sequences: list[Rows],
    ranks: Ranks,
) -> Iterator[Event]:
    """One update; when the device's memory is full, the same one in pieces of half the size."""
    began = time.perf_counter()
    rate = settings.learning_rate * learning_rate_factor(
        state.step, plan.num_steps, settings.lr_scheduler_type, plan.num_warmup_steps
    )
    for group in state.optimizer.param_groups:
        group["lr"] = state.rate_factor * rate * group.get("rate_ratio", 1.0)
    while True:
        try:
            result = train_step(
                base,
                state.adapter,
                state.optimizer,
                rows,
                sequences,
                settings,
                dropout_seed=derive(settings.seed, "dropout", state.step),
                step=state.step + 1,
                num_halvings=state.num_halvings,
                ranks=ranks,
            )
            break
        except torch.OutOfMemoryError:
            state.optimizer.zero_grad(set_to_none=True)
        # Out of the handler, so that the tensors its traceback held are free.
        yield _halved(base, state, settings, rows, sequences, ranks)
    state.step += 1
    seconds = time.perf_counter() - began
    state.seconds += seconds
    state.num_tokens += result.num_tokens
    state.num_trained_tokens += result.num_trained_tokens
    yield Stepped(
        step=state.step,
        num_steps=plan.num_steps,
        epoch=state.step / plan.steps_per_epoch,
        loss=result.loss,
        learning_rate=state.rate_factor * rate,
        grad_norm=result.grad_norm,
        num_tokens=result.num_tokens,
        num_trained_tokens=result.num_trained_tokens,
        seconds=seconds,
    )


def _halved(
    base: Base,
    state: TrainState,
    settings: TrainingSettings,
    rows: Sequence[Rendered],
    sequences: list[Rows],
    ranks: Ranks,
) -> Warned:
    """Halve the pieces from now on. Raises `SpaceError` when they hold one example each already."""
    mine = ranks.share(sequences, rows)
    most = ranks.highest(most_rows(base, settings, rows, mine, state.num_halvings))
    if most == 1:
        raise SpaceError(
            "the device's memory is too small for a single example",
            where=f"step {state.step + 1}",
            why="each piece of the step holds one example already",
            do="write gradient_checkpointing: true, or a smaller finetune_train_seqlen",
        )
    state.num_halvings += 1
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    return Warned(
        what=f"the device's memory was full at step {state.step + 1}: {most} examples at once were too many; "
        f"from here at most {-(-most // 2)}, in the same updates",
        propose="finetune_train_batch_size: "
        f"{max(1, settings.train_batch_size >> state.num_halvings)}, with more "
        "gradient_accumulation_steps",
    )


def _evaluate(
    base: Base,
    state: TrainState,
    settings: TrainingSettings,
    plan: Plan,
    rows: Sequence[Rendered],
    ranks: Ranks,
) -> Evaluated:
    """Measure the test loss; keep the weights if it is the lowest so far. Step 0 is the base model."""
    began = time.perf_counter()
    ranks.require_equal_weights(state.adapter.parameters())
    result = validate(base, rows, plan.test_sequences, settings, ranks)
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
    # The counters have counted this evaluation: a state saved from here on must not repeat it.
    state.settled_step = state.step
    seconds = time.perf_counter() - began
    state.seconds += seconds
    return Evaluated(
        step=state.step,
        epoch=state.step / plan.steps_per_epoch,
        loss=result.loss,
        token_accuracy=result.token_accuracy,
        num_trained_tokens=result.num_trained_tokens,
        is_best=is_best,
        seconds=seconds,
    )
