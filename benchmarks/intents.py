"""One intent set learnt twice: by a classification head, and as a chat whose answers are the labels.

    PHINETUNE_DATA=… python benchmarks/intents.py                 CLINC150, all 15,000 training rows
    PHINETUNE_DATA=… python benchmarks/intents.py --rows 3000     fewer rows of both parts

Both ways have the same base, rows, rank, rate and epochs; the chat may only answer with a label that stands
in the training rows. What is printed is in docs/classification.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from real_data_sets import Pair, pairs, sampled

import phinetune
from phinetune.base.events import Finished
from phinetune.runs.project import SETTINGS_FILE

NUM_TEST = 1500
COMMON: dict[str, Any] = {
    "model": "demo",
    "finetune_train_seqlen": 512,
    "finetune_test_seqlen": 512,
    "finetune_train_batch_size": 2,
    "epochs": 4.0,
    "eval_steps": 200,
    "save_steps": 200,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine_with_warmup",
    "num_warmup_steps": 20,
    "lora_dropout": 0.05,
    "lora_r": 32,
    "lora_alpha": 64.0,
}
WAYS: dict[str, dict[str, Any]] = {
    "head": {"task": "classification", "finetune_dataset": "labelled"},
    "chat": {
        "task": "chat",
        "finetune_dataset": "chats",
        "constrain_answers": "training",
        "compare_nsamples": NUM_TEST,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description="an intent set by head and by chat")
    parser.add_argument("--rows", type=int, default=0, help="training rows; 0: all")
    parser.add_argument("--set", default="clinc150", help="a set of real_data_sets whose answers are labels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="intents-") as name:
        project = Path(name)
        train, test = (in_scope(options.set, part) for part in ("train", "test"))
        train = sampled(train, options.rows, 0) if options.rows else train
        test = sampled(test, min(NUM_TEST, options.rows or NUM_TEST), 0)
        for part, rows in (("train", train), ("test", test)):
            write_rows(project, part, rows)
        (project / SETTINGS_FILE).parent.mkdir()
        print(
            f"{'':<8}{'accuracy':>10}{'95 % of gain':>20}{'macro-F1':>10}{'base':>8}{'train s':>9}{'MB':>7}"
        )
        for way, settings in WAYS.items():
            text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in {**COMMON, **settings}.items())
            (project / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
            _print(way, trained(project, way))


def in_scope(name: str, part: str) -> list[Pair]:
    """The rows that have an intent."""
    return [pair for pair in pairs(name, part) if pair.answer != "out of scope"]


def write_rows(project: Path, part: str, rows: list[Pair]) -> None:
    """The same rows twice: with a label, and with the label as the assistant's answer."""
    for folder in ("labelled", "chats"):
        (project / folder).mkdir(exist_ok=True)
    with (
        (project / "labelled" / f"{part}.json").open("w", encoding="utf-8") as labelled,
        (project / "chats" / f"{part}.json").open("w", encoding="utf-8") as chats,
    ):
        for row in rows:
            question = {"role": "user", "content": row.prompt}
            answer = {"role": "assistant", "content": row.answer}
            labelled.write(json.dumps({"messages": [question], "label": row.answer}) + "\n")
            chats.write(json.dumps({"messages": [question, answer]}) + "\n")


def trained(project: Path, name: str) -> dict[str, Any]:
    """The summary of a run."""
    for event in phinetune.train(project, run_name=name):
        if isinstance(event, Finished):
            return dict(event.summary)
    raise AssertionError("a run ends with Finished")


def _print(way: str, summary: dict[str, Any]) -> None:
    found = summary["evaluation"]
    metric = "accuracy" if "accuracy" in found["adapter"] else "exact_match"
    difference = found["difference"][metric]
    print(
        f"{way:<8}{found['adapter'][metric]:>10.1%}"
        f"{100 * difference['low']:>+11.1f} to {100 * difference['high']:+.1f}"
        f"{found['adapter']['macro_f1']:>10.1%}{found['base'][metric]:>8.1%}"
        f"{summary['seconds']:>9.0f}{summary['peak_memory_bytes'] / 1e6:>7.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
