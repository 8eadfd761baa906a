"""The optimizer of the settings over the adapter's weights. Knows nothing of rates by step, or of files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from phinetune.lora.attach import Adapter
from phinetune.training.lion import Lion
from phinetune.training.settings import OptimizerName, TrainingSettings

Groups = list[dict[str, Any]]

# Numbers that an optimizer keeps of every weight; Adafactor's are one per row and column.
NUM_MOMENTS: dict[OptimizerName, int] = {"adamw": 2, "adam": 2, "sgd": 1, "adafactor": 0, "lion": 1}


def make_optimizer(adapter: Adapter, settings: TrainingSettings) -> Optimizer:
    """The optimizer that `settings.optimizer` names; all it keeps of a weight are tensors.

    One fused call for all weights where the device and the optimizer have it.
    """
    return _MAKERS[settings.optimizer](weight_groups(adapter, settings), settings)


def weight_groups(adapter: Adapter, settings: TrainingSettings) -> Groups:
    """Matrices decay by `weight_decay`; vectors (scales and biases) do not.

    With LoRA+ (arXiv 2402.12354) the matrices B and the vectors learn at `rate_ratio` times the rate,
    the vectors as in PEFT.
    """
    parameters, ratio = adapter.parameters(), settings.loraplus_lr_ratio
    matrices = [weight for weight in parameters if weight.ndim > 1]
    vectors = [weight for weight in parameters if weight.ndim <= 1]
    groups = [(matrices, settings.weight_decay, 1.0), (vectors, 0.0, ratio)]
    if ratio != 1:
        fast = {id(weight) for name, weight in adapter.named_parameters() if name.endswith(".lora_B")}
        slow = [weight for weight in matrices if id(weight) not in fast]
        groups[:1] = [
            (slow, settings.weight_decay, 1.0),
            ([weight for weight in matrices if id(weight) in fast], settings.weight_decay, ratio),
        ]
    return [
        {"params": weights, "weight_decay": decay, "rate_ratio": times}
        for weights, decay, times in groups
        if weights
    ]


def _adamw(groups: Groups, settings: TrainingSettings) -> Optimizer:
    return AdamW(groups, fused=_has_fused(groups), **_adam_options(settings))


def _adam(groups: Groups, settings: TrainingSettings) -> Optimizer:
    return Adam(groups, fused=_has_fused(groups), **_adam_options(settings))


def _sgd(groups: Groups, settings: TrainingSettings) -> Optimizer:
    return SGD(groups, lr=settings.learning_rate, momentum=settings.sgd_momentum, fused=_has_fused(groups))


def _adafactor(groups: Groups, settings: TrainingSettings) -> Optimizer:
    # torch multiplies the rate by a matrix's mean size, but at least by the second number. B begins
    # at zero: with the usual 1e-3 it would hardly move. With 1 the rate means what it says.
    return Adafactor(groups, lr=settings.learning_rate, eps=(None, 1.0))


def _lion(groups: Groups, settings: TrainingSettings) -> Optimizer:
    return Lion(groups, lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2))


_MAKERS: dict[OptimizerName, Callable[[Groups, TrainingSettings], Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lion": _lion,
}


def _adam_options(settings: TrainingSettings) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }


def _has_fused(groups: Groups) -> bool:
    device: torch.device = groups[0]["params"][0].device
    return device.type in ("cpu", "cuda")
