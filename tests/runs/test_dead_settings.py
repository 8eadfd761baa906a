"""Every setting of lora.yaml does something: flipping it changes what is named here, in a whole run."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from labelled_project import write_labelled_set
from safetensors.torch import load_file
from tiny_project import project_maker, write_chats

from phinetune.base.errors import DivergedError, UserError
from phinetune.base.events import Compared, Evaluated, Event, Planned, Saved, Stepped, Trained
from phinetune.lora.layers import LoraLinear
from phinetune.runs import forecast as run_forecast
from phinetune.runs import prepare, proof
from phinetune.runs.train_run import train_run
from phinetune.training import forecast, validation
from phinetune.training.settings import TrainingSettings

Overrides = dict[str, str]
WARM = {"lr_scheduler_type": "linear_with_warmup"}
VARIED = {"varied_seqlen": "true"}
DIVERGING = {"learning_rate": "1.0", "lora_alpha": "1e20"}
CLASSES = {"task": "classification", "finetune_dataset": "labelled"}
EPOCHS = {"num_training_steps": "null", "varied_seqlen": "true"}

# Setting -> the flipped value, the facet of the run that must change, other settings of both runs.
TABLE: dict[str, tuple[str, str, Overrides]] = {
    "system_prompt": ("Be brief.", "num_train_tokens", {}),
    "varied_seqlen": ("true", "num_train_sequences", {}),
    "finetune_dataset": ("other", "train_sha256", {}),
    "finetune_train_nsamples": ("1", "num_train_used", {}),
    "finetune_test_nsamples": ("1", "num_test_used", VARIED),
    "finetune_train_batch_size": ("2", "step_tokens", {}),
    "finetune_test_batch_size": ("1", "num_test_batches", VARIED),
    "finetune_train_seqlen": ("200", "num_train_sequences", {}),
    "finetune_test_seqlen": ("30", "num_test_sequences", {}),
    "early_stopping_patience": ("1", "num_steps_done", {"learning_rate": "1.0", "max_grad_norm": "1e6"}),
    "epochs": ("0.5", "num_steps_done", EPOCHS),
    "eval_steps": ("2", "evaluated_steps", {"save_steps": "2"}),
    "save_steps": ("2", "saved_steps", {}),
    "learning_rate": ("1e-3", "learning_rates", {}),
    "lr_scheduler_type": ("cosine", "learning_rates", {}),
    "num_warmup_steps": ("2", "learning_rates", WARM),
    "seed": ("43", "adapter", {}),
    "evaluation_strategy": ("no", "evaluated_steps", {}),
    "lora_dropout": ("0.5", "adapter", {}),
    "adam_beta1": ("0.5", "adapter", {}),
    "adam_beta2": ("0.5", "adapter", {}),
    "adam_epsilon": ("0.1", "adapter", {}),
    "num_training_steps": ("2", "num_steps_done", {}),
    "gradient_accumulation_steps": ("2", "step_tokens", {}),
    "eval_accumulation_steps": ("1", "num_moves_to_cpu", {"finetune_test_batch_size": "1", **VARIED}),
    "eval_delay": ("3", "evaluated_steps", {}),
    "weight_decay": ("0.5", "adapter", {}),
    "retry_on_divergence": ("true", "num_steps_tried", DIVERGING),
    "max_grad_norm": ("1e-3", "adapter", {}),
    "gradient_checkpointing": ("true", "num_forwards", {}),
    "model": ("second", "base_sha256", {}),
    "lora_r": ("8", "num_parameters", {}),
    "lora_alpha": ("1", "adapter", {}),
    "lora_target_modules": ("[o_proj]", "targets", {}),
    "use_rslora": ("true", "adapter", {}),
    "loraplus_lr_ratio": ("4", "adapter", {}),
    "use_dora": ("true", "num_parameters", {}),
    "init_lora_weights": ("pissa", "adapter", {}),
    "bias": ("all", "refusal", {}),  # the model has none
    "modules_to_save": ("[norm]", "num_parameters", {}),
    "trainable_token_indices": ("[5]", "num_parameters", {}),
    "rank_pattern": ("{o_proj: 2}", "num_parameters", {}),
    "alpha_pattern": ("{o_proj: 2}", "adapter", {}),
    "layers_to_transform": ("[1]", "num_parameters", {}),
    "layers_pattern": ("[h]", "refusal", {"layers_to_transform": "[1]"}),
    "optimizer": ("lion", "adapter", {}),
    "sgd_momentum": ("0.5", "adapter", {"optimizer": "sgd"}),
    "label_smoothing": ("0.2", "adapter", {}),
    "warmup_ratio": ("0.5", "learning_rates", {**WARM, "num_warmup_steps": "1"}),
    "task": ("text", "refusal", {}),
    "labels_file": ("names.txt", "adapter", CLASSES),
    "class_weights": ("balanced", "adapter", CLASSES),
    "loss_on": ("all", "num_trained_tokens", {}),
    "overlong": ("drop", "num_train_used", {"finetune_train_seqlen": "20"}),
    "device": ("cuda", "refusal", {}),
    "dtype": ("bfloat16", "dtype", {}),
    "quantize": ("int8", "quantize", {}),
    "report_to": ("[tensorboard]", "files", {}),
    "compare_nsamples": ("1", "num_answers", {}),
    "constrain_answers": ("training", "answers", {"compare_max_new_tokens": "12"}),
    "compare_max_new_tokens": ("1", "answers", {}),
}


# What a choice cannot show here: these mean what the machine suggests, which is one of the others.
SUGGESTED = {("device", "auto"), ("dtype", "auto"), ("task", "auto")}
# Settings of both runs where a choice shows nothing under those of the table.
FOR_CHOICES: dict[str, Overrides] = {
    "lr_scheduler_type": {"num_warmup_steps": "1"},
    "optimizer": {"weight_decay": "0.5"},  # without it Adam is AdamW
    "class_weights": CLASSES,
}


def choices() -> Iterator[tuple[str, str]]:
    """Every word that a setting may have, but for those the runs below begin with."""
    begun_with = {"overlong": "cut", "dtype": "float32", "device": "cpu", "task": "chat"}
    for name, field in TrainingSettings.model_fields.items():
        if get_origin(field.annotation) is Literal:
            default = begun_with.get(name, field.default)
            yield from ((name, word) for word in get_args(field.annotation) if word != default)


def test_no_setting_is_missing_from_the_table():
    assert TABLE.keys() == TrainingSettings.model_fields.keys()
    assert {name for name, _ in choices()} == {
        "lr_scheduler_type", "evaluation_strategy", "optimizer", "loss_on", "overlong", "device", "dtype",
        "quantize", "task", "class_weights", "constrain_answers", "bias",
    }  # fmt: skip


@pytest.fixture(scope="module")
def facets_of(
    models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Overrides], dict[str, Any]]]:
    """What a run with these overrides was like; a run with the same ones is made once."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        make = project_maker(models, tmp_path_factory.mktemp("settings"))
        project = make(overlong="cut", task="chat")
        yield observed(project, models, monkeypatch)


def observed(
    project: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Overrides], dict[str, Any]]:
    (project / "other").mkdir()
    for part in ("train", "test"):
        write_chats(project / "other" / f"{part}.json", ["other", "words"])
    write_labelled_set(project / "labelled", num_extra=3)
    (project / "names.txt").write_text("red\ngreen\nblue\n")
    (project / "second").symlink_to(models[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(proof, "report_html", lambda path: None)
    monkeypatch.setattr(proof, "loss_plot", lambda events, path: None)
    # Many short runs: what costs time and has no part in the question is left out or kept.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(forecast, "_seconds_per_token", lambda *args: (1e-4, 1e-4))
    monkeypatch.setattr(run_forecast, "step_seconds", lambda *args: run_forecast.nothing_answered())
    monkeypatch.setattr(prepare, "load_renderer", functools.cache(prepare.load_renderer))
    counts: dict[str, int] = {}
    known: dict[str, dict[str, Any]] = {}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    stack, stacked = torch.stack, []
    monkeypatch.setattr(validation, "token_scores", counted("scores", validation.token_scores))
    monkeypatch.setattr(torch, "stack", lambda *args, **kw: stacked.append(1) or stack(*args, **kw))
    monkeypatch.setattr(LoraLinear, "forward", counted("forwards", LoraLinear.forward))

    def facets(overrides: Overrides) -> dict[str, Any]:
        name = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:12]
        if name not in known:
            known[name] = run_with(name, overrides)
        return known[name]

    def run_with(name: str, overrides: Overrides) -> dict[str, Any]:
        counts.clear()
        stacked.clear()
        events: list[Event] = []
        try:
            for event in train_run(project, run_name=name, overrides=overrides):
                events.append(event)
        except UserError as error:
            return {"refusal": str(error)}
        except DivergedError:
            return {"refusal": "", "num_steps_tried": sum(isinstance(event, Stepped) for event in events)}
        of = {
            kind: [event for event in events if isinstance(event, kind)]
            for kind in (Planned, Stepped, Evaluated, Saved, Trained, Compared)
        }
        run = project / "runs" / name
        summary = json.loads((run / "summary.json").read_text())
        plan = of[Planned][0].plan
        weights = load_file(run / "adapter" / "adapter_model.safetensors")
        digest = hashlib.sha256(b"".join(weights[key].numpy().tobytes() for key in sorted(weights)))
        answers = of[Compared][0].answers
        return {
            "refusal": "",
            "num_train_tokens": plan["train"]["num_tokens"],
            "num_trained_tokens": plan["train"]["num_trained_tokens"],
            "num_train_used": plan["train"]["num_used"],
            "num_test_used": plan["test"]["num_used"],
            "num_train_sequences": plan["train"]["num_sequences"],
            "num_test_sequences": plan["test"]["num_sequences"],
            "targets": [row["target"] for row in plan["coverage"]],
            "train_sha256": summary["data"]["train"]["sha256"],
            "base_sha256": summary["base"]["sha256"],
            "dtype": summary["base"]["dtype"],
            "quantize": (summary["base"]["quantize"], digest.hexdigest()),
            "num_parameters": summary["adapter"]["parameters"],
            "step_tokens": [event.num_tokens for event in of[Stepped]],
            "learning_rates": [event.learning_rate for event in of[Stepped]],
            "num_steps_done": of[Trained][0].num_steps,
            "evaluated_steps": [event.step for event in of[Evaluated]],
            "saved_steps": [event.step for event in of[Saved]],
            "adapter": digest.hexdigest(),
            "files": sorted(path.name for path in run.iterdir()),
            "num_answers": len(answers),
            "answers": [(answer["base"], answer["adapter"]) for answer in answers],
            "num_test_batches": counts["scores"],
            "num_moves_to_cpu": len(stacked) - counts["scores"],
            "num_forwards": counts["forwards"],
        }

    return facets


@pytest.mark.parametrize("key", TABLE)
def test_flipping_a_setting_changes_the_run(
    key: str, facets_of: Callable[[Overrides], dict[str, Any]]
) -> None:
    flipped, facet, others = TABLE[key]
    before, after = facets_of(others), facets_of({**others, key: flipped})
    assert before[facet] != after[facet]
    assert before["refusal"] == ""


@pytest.mark.parametrize(("key", "word"), sorted({*choices()} - SUGGESTED))
def test_every_choice_of_a_setting_is_a_run_of_its_own(
    key: str, word: str, facets_of: Callable[[Overrides], dict[str, Any]]
) -> None:
    _, facet, others = TABLE[key]
    others = FOR_CHOICES.get(key, others)
    chosen = facets_of({**others, key: word})
    rest = [other for name, other in choices() if name == key and other != word]
    runs = [
        facets_of(others),
        *(facets_of({**others, key: other}) for other in rest if (key, other) not in SUGGESTED),
    ]
    for other in runs:
        assert (chosen["refusal"], chosen.get(facet)) != (other["refusal"], other.get(facet))
