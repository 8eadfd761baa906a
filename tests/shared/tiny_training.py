"""A tiny training: random rows, a tiny base with an adapter, settings small enough for a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tiny_models import random_rows, tiny_base, with_beginning

from phinetune.base.events import Event
from phinetune.lora.attach import Adapter, attach
from phinetune.models.loading import Base
from phinetune.models.memory import Costs
from phinetune.runs.prepare import lora_settings
from phinetune.text.render import Rendered
from phinetune.training.fitting import Fitted
from phinetune.training.forecast import Probe, TrainingBytes, probe, training_bytes
from phinetune.training.loop import start, train
from phinetune.training.packing import Sequences, epoch_sequences
from phinetune.training.plan import Plan, make_plan
from phinetune.training.settings import TrainingSettings
from phinetune.training.state import TrainState

TRAIN_LENGTHS = [12, 30, 7, 25, 18, 40, 9, 22, 31, 15, 6, 28]
TEST_LENGTHS = [10, 22, 35, 8]

_SMALL: dict[str, Any] = {
    "finetune_train_seqlen": 64,
    "finetune_test_seqlen": 64,
    "finetune_train_batch_size": 2,
    "finetune_test_batch_size": 2,
    "eval_steps": 2,
    "save_steps": 2,
    "learning_rate": 5e-3,
    "lora_dropout": 0.0,
    "lora_r": 4,
    "lora_alpha": 8.0,
    "device": "cpu",
    "dtype": "float32",
}


def small_settings(**changes: Any) -> TrainingSettings:
    """Settings of a run of seconds; `changes` go on top."""
    return TrainingSettings(**{**_SMALL, **changes})


def fitted(rows: Sequence[Rendered]) -> Fitted:
    """Rows that fit as they are."""
    return Fitted(rendered=list(rows), indices=list(range(len(rows))), num_cut=0, num_dropped=0, num_split=0)


@dataclass(kw_only=True)
class TinyTraining:
    """Everything `train` takes, and a way to run it to the end."""

    base: Base
    adapter: Adapter
    state: TrainState
    settings: TrainingSettings
    plan: Plan
    train_rows: list[Rendered]
    test_rows: list[Rendered]

    def first_epoch(self) -> Sequences:
        """The sequences of the first epoch."""
        return epoch_sequences(self.plan.train_sequences, seed=self.settings.seed, epoch=0)

    def probe(self) -> Probe:
        """The forecast's measurements."""
        return probe(self.base, self.adapter, self.settings, self.first_epoch(), self.train_rows)

    def bytes(self, costs: Costs, **changes: Any) -> TrainingBytes:
        """The forecast's bytes when settings of batches or checkpointing change."""
        train, test = (self.first_epoch(), self.train_rows), (self.plan.test_sequences, self.test_rows)
        return training_bytes(costs, self.settings.model_copy(update=changes), train, test)

    def events(self) -> list[Event]:
        return list(train(self.base, self.state, self.settings, self.plan, self.train_rows, self.test_rows))


def tiny_training(
    name: str = "phi3",
    *,
    train_lengths: Sequence[int] = TRAIN_LENGTHS,
    test_lengths: Sequence[int] = TEST_LENGTHS,
    num_shared: int = 0,
    **changes: Any,
) -> TinyTraining:
    """A training that has not begun; the model is the same whatever the settings.

    All rows begin with the same `num_shared` tokens, which come on top of their lengths.
    """
    settings = small_settings(**changes)
    base = tiny_base(name)
    adapter = attach(base.model, lora_settings(settings), seed=settings.seed)
    train_rows, test_rows = (
        with_beginning(random_rows(lengths, seed=seed), num_shared)
        for lengths, seed in ((train_lengths, 1), (test_lengths, 2))
    )
    return TinyTraining(
        base=base,
        adapter=adapter,
        state=start(base, adapter, settings),
        settings=settings,
        plan=make_plan(settings, fitted(train_rows), fitted(test_rows)),
        train_rows=train_rows,
        test_rows=test_rows,
    )
