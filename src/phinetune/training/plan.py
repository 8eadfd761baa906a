"""What a run will do, worked out before any time is spent: counts, steps, evaluations, warnings.

Knows nothing of tensors or models beyond the numbers it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phinetune.text.row_files import num_tokens_of, num_trained_of
from phinetune.training.fitting import Fitted
from phinetune.training.packing import Sampling, Sequences, packed, sample
from phinetune.training.settings import TrainingSettings
from phinetune.training.unread import Caution, unread

FEW_EXAMPLES = 1000
LONGEST_WARMUP_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPlan:
    """One data set as it will be used. Tokens are of one pass."""

    num_examples: int
    num_used: int
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    num_cut: int
    num_dropped: int
    num_split: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers of a run, and the packed sets: the training set as sampled, the test set in file order."""

    train: SetPlan
    test: SetPlan
    steps_per_epoch: int
    num_steps: int
    num_warmup_steps: int
    warmup_share: float
    evaluation_steps: tuple[int, ...]
    save_steps: tuple[int, ...]
    warnings: tuple[Caution, ...]
    train_sequences: Sequences
    test_sequences: Sequences


def train_sampling(settings: TrainingSettings) -> Sampling:
    """How training rows become sequences."""
    return Sampling(
        seqlen=settings.finetune_train_seqlen,
        max_sequences=settings.finetune_train_nsamples,
        is_packed=not settings.varied_seqlen,
        seed=settings.seed,
    )


def make_plan(settings: TrainingSettings, train: Fitted, test: Fitted) -> Plan:
    """The plan for settings and rendered data."""
    lengths = num_tokens_of(train.rendered)
    sampling = train_sampling(settings)
    rows = sample(lengths, sampling)
    sequences = packed(rows, lengths, sampling)
    steps_per_epoch = math.ceil(len(sequences) / settings.effective_batch_size)
    num_steps = settings.num_training_steps or max(1, math.ceil(settings.epochs * steps_per_epoch))

    test_lengths = num_tokens_of(test.rendered)
    test_sampling = Sampling(
        seqlen=settings.finetune_test_seqlen,
        max_sequences=settings.finetune_test_nsamples,
        is_packed=not settings.varied_seqlen,
        seed=settings.seed,
    )
    test_rows = sample(test_lengths, test_sampling, in_file_order=True)
    test_sequences = packed(test_rows, test_lengths, test_sampling)
    num_warmup_steps = _num_warmup_steps(settings, num_steps)
    train_plan = _set_plan(train, rows, len(sequences))
    test_plan = _set_plan(test, test_rows, len(test_sequences))
    return Plan(
        train=train_plan,
        test=test_plan,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        num_warmup_steps=num_warmup_steps,
        warmup_share=min(num_warmup_steps, num_steps) / num_steps,
        evaluation_steps=evaluation_steps(settings, num_steps, steps_per_epoch),
        save_steps=_save_steps(settings, num_steps, steps_per_epoch),
        warnings=tuple(_warnings(settings, train_plan, test_plan, num_steps, steps_per_epoch)),
        train_sequences=sequences,
        test_sequences=test_sequences,
    )


def evaluation_steps(settings: TrainingSettings, num_steps: int, steps_per_epoch: int) -> tuple[int, ...]:
    """The steps after which the test loss is measured; always the last one."""
    delay = settings.eval_delay or 0.0
    if settings.evaluation_strategy == "steps":
        steps = [s for s in range(settings.eval_steps, num_steps + 1, settings.eval_steps)]
        steps = [step for step in steps if step >= delay]
    elif settings.evaluation_strategy == "epoch":
        num_epochs = num_steps // steps_per_epoch
        steps = [e * steps_per_epoch for e in range(1, num_epochs + 1) if e >= delay]
    else:
        steps = []
    return tuple(sorted({*steps, num_steps}))


def _num_warmup_steps(settings: TrainingSettings, num_steps: int) -> int:
    """The steps of rising rate; more than the run has when the settings say so."""
    if not settings.has_warmup:
        return 0
    if settings.warmup_ratio is None:
        return settings.num_warmup_steps
    return math.ceil(settings.warmup_ratio * num_steps)


def _save_steps(settings: TrainingSettings, num_steps: int, steps_per_epoch: int) -> tuple[int, ...]:
    every = steps_per_epoch if settings.evaluation_strategy == "epoch" else settings.save_steps
    return tuple(sorted({*range(every, num_steps + 1, every), num_steps}))


def _set_plan(fitted: Fitted, rows: Sequence[int], num_sequences: int) -> SetPlan:
    used, indices = np.asarray(rows, np.int64), np.asarray(fitted.indices, np.int64)
    return SetPlan(
        num_examples=len(np.unique(indices)) + fitted.num_dropped,
        num_used=len(np.unique(indices[used])),
        num_sequences=num_sequences,
        num_tokens=_sum(num_tokens_of(fitted.rendered), used),
        num_trained_tokens=_sum(num_trained_of(fitted.rendered), used),
        num_cut=fitted.num_cut,
        num_dropped=fitted.num_dropped,
        num_split=fitted.num_split,
    )


def _sum(counts: Sequence[int], used: npt.NDArray[np.int64]) -> int:
    return int(np.asarray(counts, np.int64)[used].sum())


def _warnings(
    settings: TrainingSettings, train: SetPlan, test: SetPlan, num_steps: int, steps_per_epoch: int
) -> list[Caution]:
    found = unread(settings)
    num_warmup = _num_warmup_steps(settings, num_steps)
    # A share was meant as one; steps were perhaps meant for a longer run.
    if settings.warmup_ratio is None and num_warmup > LONGEST_WARMUP_SHARE * num_steps:
        share = num_warmup / num_steps
        found.append(
            Caution(
                what=f"the warm-up of {num_warmup} steps is {share:.0%} of the run's "
                f"{num_steps} steps; the learning rate "
                + ("never reaches its peak" if share >= 1 else "is low for too long"),
                propose=f"num_warmup_steps: {max(1, num_steps // 20)}",
            )
        )
    if settings.evaluation_strategy == "steps" and settings.eval_steps > num_steps:
        every = max(1, num_steps // 4)
        found.append(
            Caution(
                what=f"eval_steps ({settings.eval_steps}) is more than the run's {num_steps} steps: "
                "the test loss is measured only before and after",
                propose=f"eval_steps: {every}\nsave_steps: {every}",
            )
        )
    for name, data, limit, setting in (
        ("training", train, settings.finetune_train_nsamples, "finetune_train_nsamples"),
        ("test", test, settings.finetune_test_nsamples, "finetune_test_nsamples"),
    ):
        left = data.num_examples - data.num_dropped - data.num_used
        if left > 0:
            found.append(
                Caution(
                    what=f"{left} of {data.num_examples} {name} examples are left out by {setting} ({limit})",
                    propose=f"{setting}: {_enough(limit, data)}",
                )
            )
        if data.num_cut or data.num_dropped:
            done = f"{data.num_cut} cut" if data.num_cut else f"{data.num_dropped} left out"
            longer = "finetune_train_seqlen" if name == "training" else "finetune_test_seqlen"
            found.append(
                Caution(
                    what=f"{name} chats longer than a sequence: {done} (overlong: {settings.overlong})",
                    propose=f"a larger {longer} keeps them whole",
                )
            )
    if settings.use_dora and settings.lora_dropout:
        found.append(
            Caution(
                what="DoRA with dropout computes the base's product twice: half as fast as plain LoRA",
                propose="lora_dropout: 0.0",
            )
        )
    if train.num_examples < FEW_EXAMPLES:
        found.append(
            Caution(
                what=f"{train.num_examples} training examples are few; a few thousand are advised",
                propose="add examples, or expect a small effect",
            )
        )
    shorter = max(64, settings.finetune_train_seqlen // 4)
    if steps_per_epoch < 8 and settings.effective_batch_size > 1:
        found.append(
            Caution(
                what=f"only {steps_per_epoch} step{'s' if steps_per_epoch > 1 else ''} per epoch: "
                "packing puts many examples into one step",
                propose=f"finetune_train_seqlen: {shorter}"
                if shorter < settings.finetune_train_seqlen
                else "a smaller batch: finetune_train_batch_size: 1, gradient_accumulation_steps: 1",
            )
        )
    return found


def _enough(limit: int, data: SetPlan) -> int:
    """A number of samples that would take in all examples, with a twentieth to spare."""
    return math.ceil(limit * data.num_examples / max(1, data.num_used) * 1.05)
