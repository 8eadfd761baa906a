"""Put a classifier beside what its base can say: accuracy, macro-F1 and loss, and how sure the difference is.

A base has no head. It stands for the answer that needs no model: always the most frequent class of the
training rows, its loss that of the classes' shares there. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from phinetune.base.errors import DataError
from phinetune.base.seeds import derive
from phinetune.data.conversation import Conversation, Example
from phinetune.evaluation.bootstrap import PairedMeasure, paired_bootstrap, totals
from phinetune.evaluation.compare import Answer, Comparison, Progress, Row
from phinetune.evaluation.macro_f1 import macro_f1, paired_macro_f1
from phinetune.evaluation.prompts import prompt_text
from phinetune.evaluation.scores import batch_limit, token_batches
from phinetune.generation.mode import without_dropout
from phinetune.models.batch import PackedBatch
from phinetune.models.classifier import class_logits
from phinetune.models.loading import Base
from phinetune.text.labelled import Labelled
from phinetune.text.render import Rendered


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    """log p of every class for every example: [N, C], float64."""

    log_p_NC: NDArray[np.float64]

    @property
    def class_N(self) -> NDArray[np.int64]:
        return np.asarray(self.log_p_NC.argmax(1), np.int64)


@torch.no_grad()
def predict(
    base: Base, rows: Sequence[Rendered], *, on_progress: Callable[[int], None] | None = None
) -> Predictions:
    """The classifier as it stands, on many rows in few passes."""
    parts = []
    with without_dropout(base):
        for batch in token_batches(rows, batch_limit(base)):
            logits_SC = class_logits(base, PackedBatch.lay([rows[index] for index in batch], base.device))
            parts.append(torch.log_softmax(logits_SC, -1).double().cpu().numpy())
            if on_progress:
                on_progress(batch.stop)
    return Predictions(log_p_NC=np.concatenate(parts))


def compare_classes(
    base: Base,
    counts: Sequence[int],
    examples: Sequence[Example],
    rows: Sequence[Labelled],
    *,
    num_answers_shown: int = 8,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Comparison:
    """Measure the classifier on rows of known class and bootstrap the differences; row i is of example i.

    `counts` says how often each class stood in the training rows.

    Raises `DataError` when there is nothing to measure on.
    """
    if not rows:
        raise DataError("there is nothing to compare on", why="the test set is empty", do="add examples")
    assert base.classifier is not None
    names = base.classifier.names
    report = (lambda done: on_progress(done, len(rows))) if on_progress else None
    found = predict(base, rows, on_progress=report)
    true_N = np.array([row.class_number for row in rows], np.int64)
    usual = int(np.argmax(counts))
    usual_N = np.full_like(true_N, usual)
    # One is added to each count: a class that never occurred is unlikely, not impossible.
    share_C = (np.array(counts, np.float64) + 1) / (sum(counts) + len(names))
    ones_N = np.ones(len(rows))
    measures = {
        "loss": PairedMeasure(
            base_N=-np.log(share_C)[true_N],
            adapter_N=-found.log_p_NC[np.arange(len(rows)), true_N],
            weight_N=ones_N,
        ),
        "accuracy": PairedMeasure(
            base_N=(usual_N == true_N).astype(np.float64),
            adapter_N=(found.class_N == true_N).astype(np.float64),
            weight_N=ones_N,
        ),
    }
    both = {name: totals(measure) for name, measure in measures.items()}
    sides = (usual_N, found.class_N)
    both["macro_f1"] = tuple(macro_f1(true_N, side_N, len(names)) for side_N in sides)  # type: ignore[assignment]
    draws = derive(seed, "bootstrap")
    difference = paired_bootstrap(measures, seed=draws)
    difference["macro_f1"] = paired_macro_f1(true_N, *sides, len(names), seed=draws)
    return Comparison(
        base={name: values[0] for name, values in both.items()},
        adapter={name: values[1] for name, values in both.items()},
        difference=difference,
        answers=_shown(names, examples, found, true_N, usual, num_answers_shown, seed),
        rows=tuple(
            Row(
                source=row.source,
                num_trained_tokens=1,
                base={name: float(measure.base_N[place]) for name, measure in measures.items()},
                adapter={name: float(measure.adapter_N[place]) for name, measure in measures.items()},
            )
            for place, row in enumerate(rows)
        ),
        num_scored=len(rows),
        num_answered=len(rows),
        max_new_tokens=0,
        notes=(
            f"the base has no head: it stands for the most frequent class of the training rows, "
            f"'{names[usual]}'",
        ),
    )


def _shown(
    names: Sequence[str],
    examples: Sequence[Example],
    found: Predictions,
    true_N: NDArray[np.int64],
    usual: int,
    num: int,
    seed: int,
) -> tuple[Answer, ...]:
    """A seeded sample, in the order of the examples."""
    random = np.random.default_rng(derive(seed, "answers shown"))
    chosen = sorted(random.permutation(len(examples))[: max(0, num)].tolist())
    predicted_N = found.class_N
    return tuple(
        Answer(
            prompt=_text(examples[place]),
            reference=names[true_N[place]],
            base=names[usual],
            adapter=names[predicted_N[place]],
        )
        for place in chosen
    )


def _text(example: Example) -> str:
    return prompt_text(example.messages) if isinstance(example, Conversation) else example.text
