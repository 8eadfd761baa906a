"""Settings that were changed but do nothing together with the others: said, never silently ignored.

Knows nothing of data or plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phinetune.training.settings import TrainingSettings

Question = Callable[[TrainingSettings], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """Something that will probably disappoint, and the lines of lora.yaml that would mend it."""

    what: str
    propose: str


def _has_no_warmup(settings: TrainingSettings) -> bool:
    return not settings.has_warmup


def _evaluates_at_the_end_only(settings: TrainingSettings) -> bool:
    return settings.evaluation_strategy == "no"


def _is_classification(settings: TrainingSettings) -> bool:
    return settings.task == "classification"


def _is_no_classification(settings: TrainingSettings) -> bool:
    return settings.task != "classification"


# Setting, when nobody reads it, why, and what would make it count.
_RULES: tuple[tuple[str, Question, str, str], ...] = (
    (
        "num_warmup_steps",
        _has_no_warmup,
        "lr_scheduler_type {lr_scheduler_type} does not warm up",
        "lr_scheduler_type: {lr_scheduler_type}_with_warmup",
    ),
    (
        "num_warmup_steps",
        lambda s: s.has_warmup and s.warmup_ratio is not None,
        "warmup_ratio counts instead",
        "warmup_ratio: null",
    ),
    (
        "warmup_ratio",
        _has_no_warmup,
        "lr_scheduler_type {lr_scheduler_type} does not warm up",
        "lr_scheduler_type: {lr_scheduler_type}_with_warmup",
    ),
    (
        "epochs",
        lambda s: s.num_training_steps is not None,
        "num_training_steps counts instead",
        "num_training_steps: null",
    ),
    (
        "eval_steps",
        lambda s: s.evaluation_strategy != "steps",
        "evaluation_strategy is {evaluation_strategy}",
        "evaluation_strategy: steps",
    ),
    (
        "save_steps",
        lambda s: s.evaluation_strategy == "epoch",
        "with evaluation_strategy epoch a checkpoint is saved after each epoch",
        "evaluation_strategy: steps",
    ),
    ("eval_delay", _evaluates_at_the_end_only, "evaluation_strategy is no", "evaluation_strategy: steps"),
    (
        "early_stopping_patience",
        _evaluates_at_the_end_only,
        "evaluation_strategy is no",
        "evaluation_strategy: steps",
    ),
    (
        "adam_beta1",
        lambda s: s.optimizer in ("sgd", "adafactor"),
        "optimizer is {optimizer}",
        "optimizer: adamw",
    ),
    (
        "adam_beta2",
        lambda s: s.optimizer in ("sgd", "adafactor"),
        "optimizer is {optimizer}",
        "optimizer: adamw",
    ),
    (
        "adam_epsilon",
        lambda s: s.optimizer not in ("adamw", "adam"),
        "optimizer is {optimizer}",
        "optimizer: adamw",
    ),
    ("sgd_momentum", lambda s: s.optimizer != "sgd", "optimizer is {optimizer}", "optimizer: sgd"),
    ("labels_file", _is_no_classification, "task is {task}", "task: classification"),
    ("class_weights", _is_no_classification, "task is {task}", "task: classification"),
    ("loss_on", _is_classification, "a classification trains on labels", "loss_on: assistant"),
    ("compare_nsamples", _is_classification, "a classifier answers every test row", "compare_nsamples: 200"),
    (
        "constrain_answers",
        lambda s: s.task == "classification" or s.compare_nsamples == 0,
        "nothing is answered in words",
        "constrain_answers: none",
    ),
    (
        "layers_pattern",
        lambda s: s.layers_to_transform is None,
        "layers_to_transform is null",
        "layers_pattern: []",
    ),
    (
        "compare_max_new_tokens",
        _is_classification,
        "a classifier writes no answers",
        "compare_max_new_tokens: null",
    ),
    (
        "compare_max_new_tokens",
        lambda s: s.compare_nsamples == 0 and s.task != "classification",
        "compare_nsamples is 0: nothing is answered",
        "compare_nsamples: 200",
    ),
)


def unread(settings: TrainingSettings) -> list[Caution]:
    """A caution for each setting that is not at its default and that nothing reads.

    >>> [caution.propose for caution in unread(TrainingSettings(num_warmup_steps=20))]
    ['lr_scheduler_type: linear_with_warmup']
    """
    values = settings.model_dump()
    return [
        Caution(
            what=f"{key}: {values[key]} has no effect: {why.format(**values)}",
            propose=propose.format(**values),
        )
        for key, is_unread, why, propose in _RULES
        if values[key] != TrainingSettings.model_fields[key].default and is_unread(settings)
    ]
