"""Everything of a run that can be checked before a model is loaded: settings, data, rendering, plan.

Knows nothing of models' weights, run folders or terminals.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phinetune.base.errors import UserError
from phinetune.data.conversation import Example
from phinetune.data.reading import load_examples, resolve_dataset
from phinetune.lora.settings import LoraSettings
from phinetune.models.catalog import find_model
from phinetune.runs.record import DataFile
from phinetune.text.render import Rendered, Renderer, load_renderer
from phinetune.training.fitting import Fitted, fit
from phinetune.training.plan import Plan, make_plan
from phinetune.training.settings import TrainingSettings


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
    fitted = []
    for examples, seqlen, name in (
        (train_examples, settings.finetune_train_seqlen, "finetune_train_seqlen"),
        (test_examples, settings.finetune_test_seqlen, "finetune_test_seqlen"),
    ):
        rendered = renderer.examples(examples, system_prompt=settings.system_prompt, loss_on=settings.loss_on)
        fitted.append(fit(examples, rendered, seqlen, settings.overlong, name))
    return Prepared(
        settings=settings,
        files=(DataFile.of(dataset.train), DataFile.of(dataset.test)),
        renderer=renderer,
        test_examples=test_examples,
        train=fitted[0],
        test=fitted[1],
        plan=make_plan(settings, fitted[0], fitted[1]),
    )


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
