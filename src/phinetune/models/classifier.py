"""A classification head on the last hidden state of each segment's last token, trained beside an adapter.

The conventions are those of transformers' sequence classification: the head is a linear layer `score`
without bias. It is float32, stands beside the model, not in it, and goes into the adapter's file as one of
PEFT's `modules_to_save`. Knows nothing of text or training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from phinetune.base.errors import AdapterError, IncompatibleLowRankAdapter
from phinetune.base.seeds import derive
from phinetune.lora.attach import Adapter, attach
from phinetune.lora.files import load_adapter, load_weights
from phinetune.lora.peft_format import read_peft
from phinetune.lora.settings import LoraSettings
from phinetune.lora.weights import AdapterWeights
from phinetune.lora.whole import WholeName
from phinetune.models.batch import PackedBatch
from phinetune.models.loading import Base

HEAD = "score.weight"
# The key of the adapter's metadata that holds the names of the classes as JSON.
LABELS_KEY = "labels"
# And the key that says what it reads: chats or texts.
READS_KEY, CHATS, TEXTS = "reads", "chats", "texts"
_INITIAL_SPREAD = 0.02


class Classifier(nn.Module):
    """The head: `score` (classes, hidden), the names of the classes, and what each weighs in the loss.

    With `reads_chats` it was trained on chats, and a bare text stands for a user's turn.
    """

    weights_C: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        names: Sequence[str],
        weights: Sequence[float] | None,
        device: torch.device,
        *,
        reads_chats: bool,
    ) -> None:
        super().__init__()
        self.names, self.reads_chats = tuple(names), reads_chats
        self.score = nn.Linear(hidden_size, len(self.names), bias=False, device=device, dtype=torch.float32)
        self.register_buffer("weights_C", None if weights is None else torch.tensor(weights, device=device))

    def reset(self, seed: int) -> None:
        """Fresh weights, normal with a spread of 0.02: a pure function of the seed."""
        generator = torch.Generator().manual_seed(derive(seed, "score"))
        with torch.no_grad():
            drawn = torch.empty(self.score.weight.shape).normal_(0, _INITIAL_SPREAD, generator=generator)
            self.score.weight.copy_(drawn)


class ClassifierAdapter(Adapter):
    """An adapter with a head: both are trained, saved and restored together."""

    task_type = "SEQ_CLS"

    def __init__(self, adapter: Adapter, classifier: Classifier) -> None:
        names = (*adapter.settings.modules_to_save, "score")
        settings = dataclasses.replace(adapter.settings, modules_to_save=names)
        super().__init__(adapter.layers, settings, (*adapter.parts, _Head(classifier)))
        self.classifier = classifier

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self.classifier.reset(seed)


class _Head:
    """The head among the adapter's weights that are trained whole; the base has none of its own."""

    is_enabled = True

    def __init__(self, classifier: Classifier) -> None:
        self.place = WholeName(module="score", attribute="weight", kind="module")
        self.weight: nn.Parameter = classifier.get_parameter(HEAD)

    def reset(self) -> None:
        """`Classifier.reset` draws its first weights."""

    def detach(self, model: nn.Module) -> None:
        """It stands beside the model, not in it."""


def with_classifier(
    base: Base,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    reads_chats: bool = False,
) -> Base:
    """The same base with an untrained head for these classes."""
    hidden_size = int(base.model.config.get_text_config().hidden_size)
    classifier = Classifier(hidden_size, names, weights, base.device, reads_chats=reads_chats)
    return dataclasses.replace(base, classifier=classifier)


def attach_to(base: Base, settings: LoraSettings, *, seed: int) -> Adapter:
    """A fresh adapter on a base, with a fresh head where the base has one."""
    if base.classifier is None:
        return attach(base.model, settings, seed=seed)
    adapter = attach(base.model, _without_head(settings), seed=seed)
    base.classifier.reset(seed)
    return ClassifierAdapter(adapter, base.classifier)


def load_on(base: Base, folder: Path) -> Adapter:
    """The adapter of a PEFT directory on a base, with its head where the base has one.

    Raises `IncompatibleLowRankAdapter` when base, head or classes are others.
    """
    if base.classifier is None:
        return load_adapter(base.model, folder, base_sha256=base.sha256)
    weights = read_peft(folder)
    head = weights.whole.get(HEAD)
    expected = tuple(base.classifier.score.weight.shape)
    if head is None or tuple(head.shape) != expected or class_names(weights) != base.classifier.names:
        raise IncompatibleLowRankAdapter(
            "the adapter's classification head is for other classes",
            where=str(folder),
            why="it has none" if head is None else f"its shape is {tuple(head.shape)}, expected {expected}",
            do="load it with the classes it was trained for",
        )
    bare = dataclasses.replace(
        weights,
        whole={name: tensor for name, tensor in weights.whole.items() if name != HEAD},
        settings=_without_head(weights.settings),
        task_type="CAUSAL_LM",
    )
    adapter = load_weights(base.model, bare, where=str(folder), base_sha256=base.sha256)
    with torch.no_grad():
        base.classifier.score.weight.copy_(head)
    return ClassifierAdapter(adapter, base.classifier)


def _without_head(settings: LoraSettings) -> LoraSettings:
    modules = tuple(name for name in settings.modules_to_save if name != "score")
    return dataclasses.replace(settings, modules_to_save=modules)


def class_names(weights: AdapterWeights) -> tuple[str, ...]:
    """The names of a classifier's classes; numbers for a file that was made elsewhere and names none.

    Raises `AdapterError` for an adapter without a head.
    """
    head = weights.whole.get(HEAD)
    if head is None:
        raise AdapterError(
            "the adapter has no classification head",
            do="train one with task: classification, or use it for chats",
        )
    if LABELS_KEY in weights.metadata:
        return tuple(str(name) for name in json.loads(weights.metadata[LABELS_KEY]))
    return tuple(str(number) for number in range(len(head)))


def class_logits(base: Base, batch: PackedBatch) -> Tensor:
    """Logits (segments, classes) in float32, read off the last token of each segment."""
    assert base.classifier is not None
    lengths = torch.tensor(batch.segment_lengths, device=base.device)
    hidden_SH = base.hidden_states(batch)[lengths.cumsum(0) - 1]
    logits_SC: Tensor = base.classifier.score(hidden_SH.float())
    return logits_SC


def class_loss(base: Base, batch: PackedBatch, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """The summed, weighted cross-entropy of the segments' classes, and the number of segments."""
    assert base.classifier is not None
    assert batch.classes_S is not None
    loss = torch.nn.functional.cross_entropy(
        class_logits(base, batch),
        batch.classes_S,
        weight=base.classifier.weights_C,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return loss, len(batch.classes_S)
