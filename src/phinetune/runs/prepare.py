"""Everything of a run that can be checked before a model is loaded: settings, data, rendering, plan.

Knows nothing of models' weights, run folders or terminals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phinetune.base.errors import UserError
from phinetune.data.conversation import Example
from phinetune.data.reading import resolve_dataset, sound_examples
from phinetune.lora.settings import LoraSettings
from phinetune.models.catalog import find_model
from phinetune.runs.record import DataFile
from phinetune.runs.rendering import RenderedFile, rendered_file
from phinetune.text.render import Rendered, Renderer, load_renderer
from phinetune.training.fitting import Fitted, fit
from phinetune.training.plan import Plan, make_plan
from phinetune.training.settings import TrainingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Settings and data, read, checked, rendered and fitted; no model has been loaded yet.

    Rows lie on the disk; of the examples as people wrote them only those of the test set that the plan uses
    are held. `notes` are for the user.
    """

    settings: TrainingSettings
    files: tuple[DataFile, DataFile]
    renderer: Renderer
    test_examples: list[Example]
    test_pieces: list[tuple[int, Rendered]]
    train: Fitted
    test: Fitted
    plan: Plan
    notes: tuple[str, ...]

    def used_test_examples(self) -> tuple[list[Example], list[tuple[int, Rendered]]]:
        """The test examples of the plan, and their rendered pieces as (place of the example, piece)."""
        return self.test_examples, self.test_pieces


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
    train, test = (
        rendered_file(path, project, renderer, model_folder, settings)
        for path in (dataset.train, dataset.test)
    )
    fitted_train = _fitted(train, settings, settings.finetune_train_seqlen, "finetune_train_seqlen")
    fitted_test = _fitted(test, settings, settings.finetune_test_seqlen, "finetune_test_seqlen")
    plan = make_plan(settings, fitted_train, fitted_test)
    rows = sorted(row for sequence in plan.test_sequences for row in sequence)
    indices = sorted({fitted_test.indices[row] for row in rows})
    place = {index: number for number, index in enumerate(indices)}
    return Prepared(
        settings=settings,
        files=(
            DataFile(path=str(dataset.train), sha256=train.sha256),
            DataFile(path=str(dataset.test), sha256=test.sha256),
        ),
        renderer=renderer,
        test_examples=_examples_at(dataset.test, indices),
        test_pieces=[(place[fitted_test.indices[row]], fitted_test.rendered[row]) for row in rows],
        train=fitted_train,
        test=fitted_test,
        plan=plan,
        notes=(*train.notes, *test.notes),
    )


def _fitted(file: RenderedFile, settings: TrainingSettings, seqlen: int, name: str) -> Fitted:
    return fit(file.rows, file.rows.is_chat, seqlen, settings.overlong, name)


def _examples_at(path: Path, indices: Sequence[int]) -> list[Example]:
    """The examples at these places of a file, in order; nothing after the last is read."""
    wanted = set(indices)
    examples = sound_examples(path, limit=indices[-1] + 1)
    return [example for index, example in enumerate(examples) if index in wanted]


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
