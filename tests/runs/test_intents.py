"""On a real intent set both ways to classify learn something; skipped where the set is not there."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from phinetune.base.events import Finished
from phinetune.runs.train_run import train_run

LABELS = ("translate", "transfer", "timer", "weather")


@pytest.fixture(scope="module")
def intents() -> dict[str, list[tuple[str, str]]]:
    """Four of CLINC150's intents."""
    path = Path(os.environ.get("PHINETUNE_DATA", "none")) / "intents" / "clinc150.data_full.json.xz"
    if not path.is_file():
        pytest.skip("needs PHINETUNE_DATA with CLINC150 in intents/clinc150.data_full.json.xz")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        data = json.load(file)
    return {
        part: [(text, label) for text, label in data[part] if label in LABELS] for part in ("train", "test")
    }


def written(folder: Path, intents: dict[str, list[tuple[str, str]]], *, as_chats: bool) -> None:
    folder.mkdir()
    for part, rows in intents.items():
        lines = []
        for text, label in rows:
            question = {"role": "user", "content": text}
            answer = {"role": "assistant", "content": label}
            row: dict[str, Any] = {"messages": [question, answer] if as_chats else [question]}
            lines.append(json.dumps(row if as_chats else {**row, "label": label}))
        (folder / f"{part}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["head", "chat"])
def test_the_demo_base_learns_four_intents(new_project, intents, way):
    project = new_project(
        model="demo",
        finetune_dataset="intents",
        num_training_steps=30,
        eval_steps=30,
        save_steps=30,
        finetune_train_batch_size=4,
        finetune_train_seqlen=128,
        finetune_test_seqlen=128,
        learning_rate=2e-3,
        lora_r=16,
        lora_alpha=32.0,
        compare_nsamples=60,
        compare_max_new_tokens=None,
        dtype="auto",
        **({"task": "classification"} if way == "head" else {"constrain_answers": "training"}),
    )
    written(project / "intents", intents, as_chats=way == "chat")
    finished = list(train_run(project, run_name="r"))[-1]
    assert isinstance(finished, Finished)
    evaluation = finished.summary["evaluation"]
    metric = "accuracy" if way == "head" else "exact_match"
    assert evaluation["adapter"][metric] > 0.8
    assert evaluation["difference"][metric]["low"] > 0
    assert evaluation["adapter"]["macro_f1"] > 0.8
