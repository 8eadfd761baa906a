"""Use a trained classifier again: measure it on its test set or another file, or load it to answer.

Knows nothing of terminals.
"""

from __future__ import annotations

from pathlib import Path

from phinetune.data.reading import load_examples, resolve_dataset
from phinetune.evaluation.classify import compare_classes
from phinetune.evaluation.compare import Comparison, Progress
from phinetune.evaluation.text_classifier import TextClassifier
from phinetune.lora.peft_format import read_peft
from phinetune.models.classifier import CHATS, READS_KEY, class_names, load_on, with_classifier
from phinetune.models.loading import load_base
from phinetune.models.quantized import Quantization
from phinetune.runs.again import base_name_of, prepared_again, trained_quantization
from phinetune.runs.folder import RunFolder
from phinetune.runs.prepare import found_classes, labelled_rows
from phinetune.text.labelled import Labelled
from phinetune.text.render import load_renderer
from phinetune.training.settings import TrainingSettings


def load_text_classifier(
    folder: Path,
    *,
    settings: TrainingSettings | None = None,
    root: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Quantization | None = None,
) -> TextClassifier:
    """The classifier of a PEFT directory on its base. Raises `AdapterError` when it has no head."""
    weights = read_peft(folder)
    names = class_names(weights)
    base = load_base(
        settings.model if settings else base_name_of(folder),
        device_name=device,
        dtype=dtype,
        quantize=quantize or trained_quantization(settings, weights, str(folder)),
        root=root,
    )
    base = with_classifier(base, names, reads_chats=weights.metadata.get(READS_KEY) == CHATS)
    load_on(base, folder)
    system_prompt = settings.system_prompt if settings else weights.metadata.get("system_prompt") or None
    return TextClassifier(base, load_renderer(base.folder), system_prompt=system_prompt)


def evaluate_classes(
    run: RunFolder, settings: TrainingSettings, data: Path | None, on_progress: Progress | None = None
) -> Comparison:
    """Measure a run's classifier on its own test set, or on the labelled rows of another file."""
    project = run.path.parent.parent
    if data is None:
        prepared = prepared_again(run, settings)
        assert prepared.classes is not None
        classes = prepared.classes
        examples, pieces = prepared.used_test_examples()
        rows = [row for _, row in pieces if isinstance(row, Labelled)]
    else:
        train = load_examples(resolve_dataset(settings.finetune_dataset, project).train)
        found = found_classes(project, settings, train)
        assert found is not None
        classes, examples, rows = found, load_examples(data), []
    classifier = load_text_classifier(
        run.adapter, settings=settings, root=project, device=settings.device, dtype=settings.dtype
    )
    if data is not None:
        rows = labelled_rows(settings, classifier.renderer, examples, classes)
    return compare_classes(
        classifier.base, classes.counts, examples, rows, seed=settings.seed, on_progress=on_progress
    )
