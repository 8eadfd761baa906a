"""The Python door's code: train a project, load a model with its adapter, evaluate a run.

Prints nothing. The command line and scripts use the same functions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.base.errors import UserError
from phinetune.data.conversation import Conversation, Example
from phinetune.data.reading import load_examples, resolve_dataset

if TYPE_CHECKING:
    from phinetune.base.events import Event
    from phinetune.evaluation.compare import Comparison, Progress
    from phinetune.evaluation.text_classifier import TextClassifier
    from phinetune.generation.model import Model
    from phinetune.models.quantized import Quantization
    from phinetune.runs.folder import RunFolder
    from phinetune.training.settings import TrainingSettings


def train(
    project: str | Path,
    *,
    run_name: str | None = None,
    settings: Mapping[str, str] | None = None,
    resume: bool = False,
    from_adapter: str | Path | None = None,
    nproc: int = 1,
    shard: bool = False,
) -> Iterator[Event]:
    """Train a project folder; yields events, the last is `Finished` with the run's summary.

    `settings` change lora.yaml for this run and are written as there: `{"learning_rate": "1e-3"}`.
    `resume` goes on with the named run, or the newest interrupted one; `from_adapter` begins a new run with
    the weights of a run or of a PEFT directory. `nproc` processes of this machine share the work, and with
    `shard` the base; under torchrun only the first process has events. Nothing happens until the first
    event is asked for.

        for event in phinetune.train("my-project"):
            print(event)
    """
    from phinetune.runs.train_run import train_run

    yield from train_run(
        Path(project),
        run_name=run_name,
        overrides=dict(settings or {}),
        resume=resume,
        from_adapter=Path(from_adapter) if from_adapter else None,
        nproc=nproc,
        shard=shard,
    )


def load(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Quantization | None = None,
    force_base: bool = False,
) -> Model:
    """Load a run's model with its adapter, an adapter folder on its base, or a base model alone.

    `name` is a run folder, a PEFT directory, `demo`, a model folder or a Hugging Face name. The base is
    quantised as it was when the adapter was trained, unless `quantize` (none, int8, nf4) says otherwise.
    Raises `ModelError` or `AdapterError` naming what is missing, and `IncompatibleLowRankAdapter` when the
    base is not the one the adapter was trained on; `force_base` takes it where names and shapes fit, and
    `Model.forced` says so.

        model = phinetune.load("my-project/runs/20261120-142233-k3f")
        print(model.chat("My parcel is late"))
    """
    from phinetune.generation.model import OWN, Model
    from phinetune.lora.files import CONFIG_FILE, base_difference, load_weights
    from phinetune.lora.forms import read_adapter
    from phinetune.models.loading import load_base
    from phinetune.runs.again import base_name_of, trained_quantization
    from phinetune.text.render import load_renderer

    folder, run = Path(name), run_at(name)
    settings = run_settings(run) if run else None
    adapter_folder = run.adapter if run else folder if (folder / CONFIG_FILE).is_file() else None
    spec = settings.model if settings else base_name_of(adapter_folder) if adapter_folder else str(name)
    root = run.path.parent.parent if run else None
    weights = read_adapter(adapter_folder, takes_whole=True) if adapter_folder else None
    base = load_base(
        spec,
        device_name=device,
        dtype=dtype,
        quantize=quantize or trained_quantization(settings, weights, str(adapter_folder)),
        root=root,
    )
    is_alone = adapter_folder is not None and weights is not None and weights.is_alone
    model = Model(
        str(name),
        base,
        load_renderer(base.folder),
        attached=load_weights(
            base.model,
            weights,
            where=str(adapter_folder),
            base_sha256="" if force_base else base.sha256,
        )
        if weights and is_alone
        else None,
        system_prompt=settings.system_prompt if settings else None,
        data_system_prompt=_common_system_prompt(run) if run else None,
    )
    if weights and not is_alone:
        model.load_adapter(OWN, weights, force_base=force_base)
    elif weights and (forced := base_difference(weights, base.sha256)):
        model.forced[OWN] = forced
    return model


def load_classifier(
    name: str | Path, *, device: str = "auto", dtype: str = "auto", quantize: Quantization | None = None
) -> TextClassifier:
    """Load the classifier of a run, or of a PEFT directory whose head is `score`.

    Raises `AdapterError` when it has no head.

        classifier = phinetune.load_classifier("my-project/runs/20261120-142233-k3f")
        print(classifier.classify(["where is my parcel"])[0].label)
    """
    from phinetune.runs.classification import load_text_classifier

    run = run_at(name)
    return load_text_classifier(
        run.adapter if run else Path(name),
        settings=run_settings(run) if run else None,
        root=run.path.parent.parent if run else None,
        device=device,
        dtype=dtype,
        quantize=quantize,
    )


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    *,
    on_progress: Progress | None = None,
    force_base: bool = False,
) -> Comparison:
    """Measure a run's base and adapter again, on its own test set or on another file.

    On its own test set the figures are those of the run. `on_progress(done, total)` counts examples.
    Raises `UserError` when the test set is no longer the one of the run. `force_base` is as in `load`; a
    note of the comparison says so.

        comparison = phinetune.evaluate("my-project/runs/20261120-142233-k3f")
        print(comparison.adapter["exact_match"])
    """
    from phinetune.evaluation.compare import compare
    from phinetune.lora.files import base_difference, load_weights
    from phinetune.lora.peft_format import read_peft
    from phinetune.models.loading import load_base
    from phinetune.runs.again import choices_again, prepared_again
    from phinetune.text.render import load_renderer

    found = _run_or_refuse(run)
    settings = run_settings(found)
    if settings.task == "classification":
        from phinetune.runs.classification import evaluate_classes

        return evaluate_classes(found, settings, Path(data) if data else None, on_progress)
    prepared = None if data else prepared_again(found, settings)
    examples, pieces = prepared.used_test_examples() if prepared else (load_examples(Path(str(data))), None)
    base = load_base(
        settings.model,
        device_name=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        root=found.path.parent.parent,
    )
    weights = read_peft(found.adapter)
    forced = base_difference(weights, base.sha256) if force_base else ""
    adapter = load_weights(
        base.model, weights, where=str(found.adapter), base_sha256="" if force_base else base.sha256
    )
    comparison = compare(
        base,
        adapter,
        load_renderer(base.folder),
        examples,
        pieces=pieces,
        max_answered=settings.compare_nsamples,
        max_new_tokens=settings.compare_max_new_tokens,
        seed=settings.seed,
        system_prompt=settings.system_prompt,
        loss_on=settings.loss_on,
        choices=prepared.choices if prepared else choices_again(found, settings),
        on_progress=on_progress,
    )
    notes = (f"the adapter was forced on another base: {forced}",) if forced else ()
    return dataclasses.replace(comparison, notes=(*notes, *comparison.notes))


def test_set_of(name: str | Path) -> list[Example]:
    """The examples of a run's test file, in file order."""
    run = _run_or_refuse(name)
    dataset = resolve_dataset(run_settings(run).finetune_dataset, run.path.parent.parent)
    return load_examples(dataset.test) if dataset.test else []


def _run_or_refuse(name: str | Path) -> RunFolder:
    from phinetune.runs.folder import find_run

    return run_at(name) or find_run(Path(name))


def run_at(name: str | Path) -> RunFolder | None:
    """The run that a run folder, its adapter folder or a trained project stands for, if any."""
    from phinetune.runs.folder import find_run

    folder = Path(name)
    looks_like_one = any(
        place.exists() for place in (folder / "run.json", folder.parent / "run.json", folder / "runs")
    )
    return find_run(folder) if folder.is_dir() and looks_like_one else None


def run_settings(run: RunFolder) -> TrainingSettings:
    """The settings a run was trained with."""
    from phinetune.training.lora_yaml import validated

    values = json.loads(run.run_json.read_text(encoding="utf-8"))["settings"]
    return validated(values, {}, str(run.run_json))


def run_summary(run: RunFolder) -> Mapping[str, Any]:
    """The content of summary.json. Raises `UserError` when the run has not finished."""
    if not run.summary.is_file():
        raise UserError(
            "this run has no summary",
            where=str(run.summary),
            why="it is still training, or was interrupted",
            do="train again, or name a finished run",
        )
    summary: Mapping[str, Any] = json.loads(run.summary.read_text(encoding="utf-8"))
    return summary


def _common_system_prompt(run: RunFolder) -> str | None:
    """The system message that every test example begins with, if it is the same one.

    A data set that is gone is no reason not to talk with the model.
    """
    try:
        examples = test_set_of(run.path)
    except UserError:
        return None
    messages = {
        example.messages[0].content if example.messages[0].role == "system" else None
        for example in examples
        if isinstance(example, Conversation)
    }
    return messages.pop() if len(messages) == 1 else None
