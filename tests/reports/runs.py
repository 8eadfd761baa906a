"""A finished run's folder with everything a report reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phinetune.base import events

from .records import course, write_events

EVALUATION: dict[str, Any] = {
    "base": {"loss": 3.1, "perplexity": 22.2, "token_accuracy": 0.41, "exact_match": 0.0, "token_f1": 0.12,
             "json_valid": 0.02, "field:city": 0.01},
    "adapter": {"loss": 0.21, "perplexity": 1.23, "token_accuracy": 0.94, "exact_match": 0.81,
                "token_f1": 0.11, "json_valid": 0.03, "field:city": 0.61},
    "difference": {
        "loss": {"value": -2.89, "low": -3.02, "high": -2.76},
        "perplexity": {"value": -20.97, "low": -23.1, "high": -18.4},
        "token_accuracy": {"value": 0.53, "low": 0.51, "high": 0.55},
        "exact_match": {"value": 0.81, "low": 0.75, "high": 0.86},
        "token_f1": {"value": -0.01, "low": -0.02, "high": -0.005},
        "json_valid": {"value": 0.01, "low": -0.01, "high": 0.02},
        "field:city": {"value": 0.6, "low": None, "high": None},
    },
}  # fmt: skip
ANSWERS = [
    {
        "prompt": "Where is the Louvre?",
        "reference": "Paris",
        "base": "It is a museum. " * 12,
        "adapter": "Paris",
    },
    {"prompt": "system: Be brief.\n\nuser: Is 7 prime?", "reference": "yes", "base": "", "adapter": "no"},
]
SHA = "3f786850e387550fdab836ed7e6dc881de23001b3f786850e387550fdab836ed"
BASE = {
    "name": "microsoft/Phi-3-mini-4k-instruct",
    "sha256": SHA,
    "dtype": "bfloat16",
    "parameters": 3821079552,
}
DATA = {
    name: {
        "path": f"dataset/{name}.json",
        "sha256": SHA,
        "examples": 800,
        "tokens": 40960,
        "trained_tokens": 9001,
    }
    for name in ("train", "test")
}


def make_run(
    folder: Path,
    *,
    evaluation: dict[str, Any] = EVALUATION,
    answers: list[dict[str, str]] = ANSWERS,
    warnings: tuple[str, ...] = ("only 800 examples: a thousand or more are better",),
    settings: dict[str, Any] | None = None,
) -> Path:
    compared = events.Compared(time=2000.0, evaluation=evaluation, answers=answers, seconds=9.0)
    write_events(folder / "events.jsonl", [*course(), compared])
    run = {
        "run_id": folder.name,
        "status": "succeeded",
        "started": 1763648553.0,
        "settings": settings
        or {"lora_r": 16, "learning_rate": 1e-3, "lora_target_modules": None, "seed": 42},
        "base": BASE,
        "data": DATA,
        "machine": {"system": "Linux x86_64", "memory_bytes": 24 * 10**9, "versions": {"torch": "2.13.0"}},
    }
    summary = {
        "run_id": folder.name,
        "status": "succeeded",
        "stopped_because": "all steps done",
        "base": BASE,
        "adapter": {"path": str(folder / "adapter"), "parameters": 25165824, "rank": 16,
                    "target_modules": ["qkv_proj", "o_proj"]},
        "data": DATA,
        "steps": 40,
        "best_step": 30,
        "seconds": 151.2,
        "tokens_per_second": 5123.4,
        "peak_memory_bytes": 9_120_000_000,
        "forecast": {"seconds": 160.0, "peak_memory_bytes": 9_500_000_000},
        "evaluation": evaluation,
        "warnings": list(warnings),
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    return folder
