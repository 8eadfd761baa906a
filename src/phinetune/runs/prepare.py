"""Everything of a run that can be checked before a model is loaded: settings, data, rendering, plan.

Knows nothing of how models are loaded, run folders or terminals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phinetune.base.errors import DataError, SettingsError, UserError
from phinetune.base.files import sha256_file
from phinetune.data.classes import Classes, check_labels, classes_of, require_labels
from phinetune.data.conversation import Conversation, Example
from phinetune.data.reading import DatasetFiles, load_examples, resolve_dataset, sound_examples
from phinetune.lora.settings import LoraSettings
from phinetune.models.catalog import find_model
from phinetune.models.classifier import with_classifier
from phinetune.models.loading import Base
from phinetune.runs.record import DataFile
from phinetune.runs.rendering import RenderedFile, rendered_file
from phinetune.text.labelled import Labelled, render_labelled
from phinetune.text.render import Rendered, Renderer, load_renderer
from phinetune.training.fitting import Fitted, fit
from phinetune.training.labelled import fit_labelled
from phinetune.training.plan import Plan, make_plan
from phinetune.training.settings import TrainingSettings

MOST_CHOICES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Settings and data, read, checked, rendered and fitted; no model has been loaded yet.

    Rows lie on the disk (those of a classification in memory). Of the examples as people wrote them only
    those of the test set that the plan uses are held. `notes` are for the user.
    """

    settings: TrainingSettings
    files: tuple[DataFile, DataFile]
    renderer: Renderer
    test_examples: list[Example]
    test_pieces: list[tuple[int, Rendered]]
    train: Fitted
    test: Fitted
    plan: Plan
    classes: Classes | None = None
    # The only texts that may be answered in the comparison; None: any.
    choices: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def used_test_examples(self) -> tuple[list[Example], list[tuple[int, Rendered]]]:
        """The test examples of the plan, and their rendered pieces as (place of the example, piece)."""
        return self.test_examples, self.test_pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """Both sets, fitted, and what was found on the way."""

    sha256: tuple[str, str]
    train: Fitted
    test: Fitted
    classes: Classes | None = None
    choices: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def prepare(project: Path, settings: TrainingSettings) -> Prepared:
    """Read, check, render and fit the data, and make the plan. Raises `UserError` on any fault."""
    dataset = resolve_dataset(settings.finetune_dataset, project)
    if dataset.test is None:
        raise UserError(
            "there is no test set",
            where=str(dataset.train.parent),
            why="without one nothing can be proven, and the best checkpoint is unknown",
            do="put a test.json beside train.json; a tenth of the rows, not used in training, will do",
        )
    model_folder = find_model(settings.model, root=project)
    renderer = load_renderer(model_folder)
    if settings.task == "classification":
        data = _labelled(project, settings, renderer, dataset, dataset.test)
    else:
        data = _rendered(project, settings, renderer, model_folder, dataset, dataset.test)
    plan = make_plan(settings, data.train, data.test)
    rows = sorted(plan.test_sequences.rows)
    indices = sorted({data.test.indices[row] for row in rows})
    place = {index: number for number, index in enumerate(indices)}
    return Prepared(
        settings=settings,
        files=(
            DataFile(path=str(dataset.train), sha256=data.sha256[0]),
            DataFile(path=str(dataset.test), sha256=data.sha256[1]),
        ),
        renderer=renderer,
        test_examples=_examples_at(dataset.test, indices),
        test_pieces=[(place[data.test.indices[row]], data.test.rendered[row]) for row in rows],
        train=data.train,
        test=data.test,
        plan=plan,
        classes=data.classes,
        choices=data.choices,
        notes=data.notes,
    )


def _rendered(
    project: Path,
    settings: TrainingSettings,
    renderer: Renderer,
    model_folder: Path,
    dataset: DatasetFiles,
    test_path: Path,
) -> _Data:
    train, test = (
        rendered_file(path, project, renderer, model_folder, settings) for path in (dataset.train, test_path)
    )
    require_task(settings.task, [train, test])
    is_constrained = settings.constrain_answers != "none"
    return _Data(
        sha256=(train.sha256, test.sha256),
        train=_fitted(train, settings, "finetune_train_seqlen"),
        test=_fitted(test, settings, "finetune_test_seqlen"),
        choices=found_choices(settings, renderer, sound_examples(dataset.train)) if is_constrained else None,
        notes=(*train.notes, *test.notes),
    )


def _fitted(file: RenderedFile, settings: TrainingSettings, limit: str) -> Fitted:
    return fit(file.rows, file.rows.is_chat, getattr(settings, limit), settings.overlong, limit)


def _labelled(
    project: Path, settings: TrainingSettings, renderer: Renderer, dataset: DatasetFiles, test_path: Path
) -> _Data:
    examples = load_examples(dataset.train)
    classes = found_classes(project, settings, examples)
    assert classes is not None
    fitted = [
        fit_labelled(
            labelled_rows(settings, renderer, rows, classes),
            getattr(settings, limit),
            settings.overlong,
            limit,
        )
        for rows, limit in (
            (examples, "finetune_train_seqlen"),
            (load_examples(test_path), "finetune_test_seqlen"),
        )
    ]
    return _Data(
        sha256=(sha256_file(dataset.train), sha256_file(test_path)),
        train=fitted[0],
        test=fitted[1],
        classes=classes,
    )


def _examples_at(path: Path, indices: Sequence[int]) -> list[Example]:
    """The examples at these places of a file, in order; nothing after the last is read."""
    wanted = set(indices)
    examples = sound_examples(path, limit=indices[-1] + 1)
    return [example for index, example in enumerate(examples) if index in wanted]


def found_choices(
    settings: TrainingSettings, renderer: Renderer, examples: Iterable[Example]
) -> tuple[str, ...] | None:
    """The different answers of the training rows, where the settings constrain answers to them."""
    if settings.constrain_answers == "none" or settings.task == "classification":
        return None
    chats = (example for example in examples if isinstance(example, Conversation))
    answers = tuple(sorted({renderer.split(chat)[1].strip() for chat in chats} - {""}))
    if not 1 < len(answers) <= MOST_CHOICES:
        raise SettingsError(
            "answers cannot be constrained to those of the training rows",
            where="constrain_answers",
            why=f"they have {len(answers):,} different answers; 2 to {MOST_CHOICES:,} can be chosen from",
            do="write constrain_answers: none",
        )
    return answers


def found_classes(project: Path, settings: TrainingSettings, examples: Sequence[Example]) -> Classes | None:
    """The classes of a classification, from its training rows and its labels file; else None."""
    if settings.task != "classification":
        return None
    file = project / settings.labels_file if settings.labels_file else None
    return classes_of(examples, file, settings.class_weights)


def labelled_rows(
    settings: TrainingSettings, renderer: Renderer, examples: Sequence[Example], classes: Classes
) -> list[Labelled]:
    """Rows of known class, rendered. Raises `DataError` for labels that are not known."""
    require_labels(examples)
    check_labels(examples, classes.names, settings.labels_file or "the training rows")
    return render_labelled(renderer, examples, classes.names, system_prompt=settings.system_prompt)


def require_task(task: str, files: Sequence[RenderedFile]) -> None:
    """Raise `DataError` when the task is chat or text and rows are of the other kind."""
    if task not in ("chat", "text"):
        return
    places = [(file.rows, np.flatnonzero(file.rows.is_chat != (task == "chat"))) for file in files]
    num_strange = sum(len(found) for _, found in places)
    if num_strange:
        first = next(rows[int(found[0])] for rows, found in places if len(found))
        other = "text" if task == "chat" else "chat"
        raise DataError(
            f"{num_strange:,} rows are {'plain text' if task == 'chat' else 'chats'}, the task is {task}",
            where=str(first.source),
            do=f"write task: auto, which takes both, or task: {other}; or correct the rows",
        )


def prepared_base(base: Base, prepared: Prepared) -> Base:
    """The base with a head for the classes of a classification, or as it is."""
    classes = prepared.classes
    if not classes:
        return base
    return with_classifier(base, classes.names, classes.weights, reads_chats=classes.reads_chats)


def lora_settings(settings: TrainingSettings) -> LoraSettings:
    """The part of the settings that shapes the adapter."""
    return LoraSettings(
        rank=settings.lora_r,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules,
        use_rslora=settings.use_rslora,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        layers_to_transform=settings.layers_to_transform,
        layers_pattern=settings.layers_pattern,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights,
        bias=settings.bias,
        modules_to_save=settings.modules_to_save,
        trainable_token_indices=settings.trainable_token_indices,
    )
