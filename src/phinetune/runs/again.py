"""What a trained run or adapter is measured and used on again: its base's name and form, its own test set.

Knows nothing of how anything is measured.
"""

from __future__ import annotations

import json
from pathlib import Path

from phinetune.base.errors import AdapterError, UserError
from phinetune.data.reading import resolve_dataset, sound_examples
from phinetune.lora.files import CONFIG_FILE
from phinetune.lora.peft_config import read_config
from phinetune.lora.weights import AdapterWeights
from phinetune.models.catalog import find_model
from phinetune.models.quantized import Quantization
from phinetune.runs.folder import RunFolder
from phinetune.runs.prepare import Prepared, found_choices, prepare
from phinetune.text.render import load_renderer
from phinetune.training.settings import TrainingSettings


def prepared_again(run: RunFolder, settings: TrainingSettings) -> Prepared:
    """A run's settings and data as they were. Raises `UserError` when the test set has changed since."""
    prepared = prepare(run.path.parent.parent, settings)
    recorded = json.loads(run.run_json.read_text(encoding="utf-8"))["data"]["test"]["sha256"]
    if prepared.files[1].sha256 != recorded:
        raise UserError(
            "the test set has changed since this run",
            where=prepared.files[1].path,
            why=f"its sha256 was {recorded[:12]}, now it is {prepared.files[1].sha256[:12]}",
            do="put the old file back, or measure on the new one by naming it: --data FILE",
        )
    return prepared


def choices_again(run: RunFolder, settings: TrainingSettings) -> tuple[str, ...] | None:
    """The answers that a run's comparison was constrained to, from its training file."""
    if settings.constrain_answers == "none":
        return None
    project = run.path.parent.parent
    train = sound_examples(resolve_dataset(settings.finetune_dataset, project).train)
    return found_choices(settings, load_renderer(find_model(settings.model, root=project)), train)


def trained_quantization(
    settings: TrainingSettings | None, weights: AdapterWeights | None, where: str
) -> Quantization:
    """How the base was kept while the adapter was trained: by its run, or by the adapter's own header."""
    if settings:
        return settings.quantize
    recorded = weights.metadata.get("quantize", "none") if weights else "none"
    for known in ("none", "int8", "nf4"):
        if recorded == known:
            return known
    raise AdapterError(
        f"the adapter was trained on a base in '{recorded}', which is not known here",
        where=where,
        do="load it with quantize='none', or with a later version",
    )


def base_name_of(adapter_folder: Path) -> str:
    """The base that a PEFT directory names. Raises `AdapterError` when it names none."""
    name = read_config(adapter_folder / CONFIG_FILE).get("base_model_name_or_path")
    if not name:
        raise AdapterError(
            "the adapter does not say which base it belongs to",
            where=str(adapter_folder / CONFIG_FILE),
            why="base_model_name_or_path is missing",
            do="write the base model's name or folder there",
        )
    return str(name)
