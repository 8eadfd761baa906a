"""A tiny training: random rows, a tiny base with an adapter, settings small enough for a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tiny_models import random_rows, tiny_base

from phinetune.base.events import Event
from phinetune.lora.attach import Adapter, attach
from phinetune.models.loading import Base
from phinetune.runs.prepare import lora_settings
from phinetune.text.render import Rendered
from phinetune.training.fitting import Fitted
from phinetune.training.loop import start, train
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

    def events(self) -> list[Event]:
        return list(train(self.base, self.state, self.settings, self.plan, self.train_rows, self.test_rows))


def tiny_training(
    name: str = "phi3",
    *,
    train_lengths: Sequence[int] = TRAIN_LENGTHS,
    test_lengths: Sequence[int] = TEST_LENGTHS,
    **changes: Any,
) -> TinyTraining:
    """A training that has not begun; the model is the same whatever the settings."""
    settings = small_settings(**changes)
    base = tiny_base(name)
    adapter = attach(base.model, lora_settings(settings), seed=settings.seed)
    train_rows, test_rows = random_rows(train_lengths, seed=1), random_rows(test_lengths, seed=2)
    return TinyTraining(
        base=base,
        adapter=adapter,
        state=start(base, adapter, settings),
        settings=settings,
        plan=make_plan(settings, fitted(train_rows), fitted(test_rows)),
        train_rows=train_rows,
        test_rows=test_rows,
    )
