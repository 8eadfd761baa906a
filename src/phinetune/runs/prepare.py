"""Everything of a run that can be checked before a model is loaded: settings, data, rendering, plan.

Knows nothing of how models are loaded, run folders or terminals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phinetune.base.errors import DataError, SettingsError, UserError
from phinetune.data.classes import Classes, check_labels, classes_of, require_labels
from phinetune.data.conversation import Conversation, Example, PlainText
from phinetune.data.reading import load_examples, resolve_dataset
from phinetune.lora.settings import LoraSettings
from phinetune.models.catalog import find_model
from phinetune.models.classifier import with_classifier
from phinetune.models.loading import Base
from phinetune.runs.record import DataFile
from phinetune.text.labelled import Labelled, render_labelled
from phinetune.text.render import Rendered, Renderer, load_renderer
from phinetune.training.fitting import Fitted, fit
from phinetune.training.labelled import fit_labelled
from phinetune.training.plan import Plan, make_plan
from phinetune.training.settings import TrainingSettings

MOST_CHOICES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Settings and data, read, checked, rendered and fitted; no model has been loaded yet."""

    settings: TrainingSettings
    files: tuple[DataFile, DataFile]
    renderer: Renderer
    test_examples: list[Example]
    train: Fitted
    test: Fitted
    plan: Plan
    classes: Classes | None = None
    # The only texts that may be answered in the comparison; None: any.
    choices: tuple[str, ...] | None = None

    def used_test_examples(self) -> tuple[list[Example], list[tuple[int, Rendered]]]:
        """The test examples of the plan, and their rendered pieces as (place of the example, piece)."""
        rows = sorted({row for sequence in self.plan.test_sequences for row in sequence})
        indices = sorted({self.test.indices[row] for row in rows})
        place = {index: number for number, index in enumerate(indices)}
        examples = [self.test_examples[index] for index in indices]
        return examples, [(place[self.test.indices[row]], self.test.rendered[row]) for row in rows]


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
    train_examples = load_examples(dataset.train)
    test_examples = load_examples(dataset.test)
    renderer = load_renderer(find_model(settings.model, root=project))
    require_task(settings.task, [*train_examples, *test_examples])
    classes = found_classes(project, settings, train_examples)
    train = _fitted(settings, renderer, train_examples, "finetune_train_seqlen", classes)
    test = _fitted(settings, renderer, test_examples, "finetune_test_seqlen", classes)
    return Prepared(
        settings=settings,
        files=(DataFile.of(dataset.train), DataFile.of(dataset.test)),
        renderer=renderer,
        test_examples=test_examples,
        train=train,
        test=test,
        plan=make_plan(settings, train, test),
        classes=classes,
        choices=found_choices(settings, renderer, train_examples),
    )


def found_choices(
    settings: TrainingSettings, renderer: Renderer, examples: Sequence[Example]
) -> tuple[str, ...] | None:
    """The different answers of the training rows, where the settings constrain answers to them."""
    if settings.constrain_answers == "none" or settings.task == "classification":
        return None
    chats = [example for example in examples if isinstance(example, Conversation)]
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


def require_task(task: str, examples: Sequence[Example]) -> None:
    """Raise `DataError` when the task is chat or text and rows are of the other kind."""
    wanted = {"chat": Conversation, "text": PlainText}.get(task)
    strange = [example for example in examples if wanted and not isinstance(example, wanted)]
    if strange:
        other = "text" if task == "chat" else "chat"
        raise DataError(
            f"{len(strange):,} rows are {'plain text' if task == 'chat' else 'chats'}, the task is {task}",
            where=str(strange[0].source),
            do=f"write task: auto, which takes both, or task: {other}; or correct the rows",
        )


def _fitted(
    settings: TrainingSettings,
    renderer: Renderer,
    examples: Sequence[Example],
    limit: str,
    classes: Classes | None,
) -> Fitted:
    seqlen = getattr(settings, limit)
    if classes:
        rows = labelled_rows(settings, renderer, examples, classes)
        return fit_labelled(rows, seqlen, settings.overlong, limit)
    rendered = renderer.examples(examples, system_prompt=settings.system_prompt, loss_on=settings.loss_on)
    return fit(examples, rendered, seqlen, settings.overlong, limit)


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
