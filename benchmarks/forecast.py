"""How true are the forecasts of memory and time? A grid of whole runs, each in a process of its own.

    python benchmarks/forecast.py            a table
    python benchmarks/forecast.py --json     one JSON object
    python benchmarks/forecast.py --only demo,tiny    some of the grid

Models have random weights (but for the bundled one). What is compared, and how: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import machine, versions

BF16, FP32 = {"dtype": "bfloat16"}, {"dtype": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A random Phi-3."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocab: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run: a model, chats of about `words` words, settings."""

    model: str
    words: int = 60
    steps: int = 40
    settings: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "tiny": Model(hidden=64, inner=160, layers=2, heads=2, vocab=4096),
    "wide-vocabulary": Model(hidden=256, inner=704, layers=4, heads=4, vocab=64_000),
    "30m": Model(hidden=512, inner=1408, layers=7, heads=8, vocab=8192),
    "100m": Model(hidden=768, inner=2048, layers=12, heads=12, vocab=32_064),
}
GRID = {
    "demo": Case(model="demo", steps=120, settings={**BF16, "finetune_train_batch_size": 2}),
    "demo-float32": Case(model="demo", settings=FP32),
    "demo-checkpointed": Case(model="demo", settings={**BF16, "gradient_checkpointing": True}),
    "demo-long": Case(
        model="demo", words=300, settings={**BF16, "finetune_train_seqlen": 2048, "lora_dropout": 0.0}
    ),
    "tiny": Case(model="tiny", steps=100, settings={**BF16, "finetune_train_batch_size": 4}),
    "tiny-unpacked": Case(model="tiny", steps=100, settings={**FP32, "varied_seqlen": True}),
    "wide-vocabulary": Case(model="wide-vocabulary", settings=BF16),
    "wide-vocabulary-float32": Case(
        model="wide-vocabulary", settings={**FP32, "finetune_train_batch_size": 1}
    ),
    "30m": Case(model="30m", settings={**BF16, "finetune_train_batch_size": 2}),
    "30m-unpacked": Case(
        model="30m", settings={**BF16, "varied_seqlen": True, "finetune_train_batch_size": 8}
    ),
    "30m-float32-checkpointed": Case(
        model="30m", steps=25, settings={**FP32, "gradient_checkpointing": True}
    ),
    "100m": Case(model="100m", steps=25, settings={**BF16, "finetune_train_batch_size": 1}),
    "100m-2048": Case(
        model="100m", words=200, steps=22, settings={**BF16, "finetune_train_seqlen": 1024, "lora_r": 64}
    ),
    "100m-checkpointed": Case(
        model="100m", steps=22, settings={**BF16, "gradient_checkpointing": True, "lora_dropout": 0.0}
    ),
}
COMMON: dict[str, Any] = {
    "finetune_dataset": "dataset",
    "finetune_train_seqlen": 512,
    "finetune_test_seqlen": 1024,
    "finetune_train_batch_size": 2,
    "eval_steps": 20,
    "save_steps": 20,
    "compare_nsamples": 16,
    "compare_max_new_tokens": 24,
    "device": "cpu",
}


def main() -> None:
    options = _options()
    if options.worker:
        _work(Path(options.worker))
        return
    names = [name for name in GRID if not options.only or name in options.only.split(",")]
    with tempfile.TemporaryDirectory(prefix="forecast-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--make", name], check=True)
        rows = [_run(folder, name) for name in names] if not options.make else []
    report = {
        **_errors(rows),
        "rows": rows,
        "machine": machine(0),
        "versions": versions(("phinetune", "torch", "transformers")),
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="forecast against measured, for memory and time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", default="", help="names of the grid, with commas between")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--make", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        _make_models(Path(options.make))
        sys.exit()
    return options


def _make_models(folder: Path) -> None:
    """Random models under the bundled tokenizer."""
    import shutil

    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    from phinetune.models.catalog import demo_folder

    for name, model in MODELS.items():
        torch.manual_seed(0)
        config = Phi3Config(
            vocab_size=model.vocab, hidden_size=model.hidden, intermediate_size=model.inner,
            num_hidden_layers=model.layers, num_attention_heads=model.heads,
            num_key_value_heads=model.heads, max_position_embeddings=4096,
            original_max_position_embeddings=4096, pad_token_id=1, bos_token_id=0, eos_token_id=0,
            tie_word_embeddings=model.vocab > 10_000, dtype="bfloat16",
        )  # fmt: skip
        Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_folder() / file, folder / name / file)


def _run(folder: Path, name: str) -> dict[str, Any]:
    """One run in a process that has held nothing yet; the starter imports no PyTorch."""
    case = GRID[name]
    project = folder / "projects" / name
    project.mkdir(parents=True)
    model = case.model if case.model == "demo" else str(folder / case.model)
    settings = {**COMMON, **case.settings, "num_training_steps": case.steps, "model": model}
    for part, number in (("train", 400), ("test", 32)):
        _write_chats(project / f"{part}.json", case.words, number)
    (project / "case.json").write_text(json.dumps(settings), encoding="utf-8")
    print(f"{name} …", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--worker", str(project)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    row = {"name": name, **json.loads(done.stdout.splitlines()[-1])}
    _errors([row])
    print(f"{_memory(row)} MB, {row['seconds_measured']:.0f} s", file=sys.stderr, flush=True)
    return row


def _write_chats(path: Path, words: int, number: int) -> None:
    """Chats of log-normal length; a quarter of the words is the answer."""
    chance = random.Random(f"{path.stem} {words}")
    syllables = ["ka", "lo", "mi", "ten", "ra", "su", "vel", "dor", "pin", "ash"]

    def text(length: int) -> str:
        return " ".join("".join(chance.choices(syllables, k=2)) for _ in range(max(1, length)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            length = min(2 * words, int(words * chance.lognormvariate(-0.1, 0.5)))
            turns = (("user", text(3 * length // 4)), ("assistant", text(length // 4)))
            row = {"messages": [{"role": role, "content": content} for role, content in turns]}
            file.write(json.dumps(row) + "\n")


def _work(project: Path) -> None:
    """Train in this process and print what was forecast and what came."""
    from phinetune.base.events import Compared, Finished, Planned, Reforecast, Trained
    from phinetune.models.memory import peak_resident_bytes
    from phinetune.runs.project import create_project
    from phinetune.runs.train_run import train_run
    from phinetune.training.settings import TrainingSettings

    settings = json.loads((project / "case.json").read_text(encoding="utf-8"))
    # Until the loss of a random model falls is no concern here.
    settings["early_stopping_patience"] = 1000
    settings["overlong"] = "drop"
    target = project / "project"
    create_project(
        target, TrainingSettings(**settings), train=project / "train.json", test=project / "test.json"
    )
    kept: dict[type, Any] = {}
    at_trained = 0
    for event in train_run(target, run_name="run"):
        kept[type(event)] = event
        if isinstance(event, Trained):
            at_trained = peak_resident_bytes()
    forecast = kept[Planned].plan["forecast"]
    summary = kept[Finished].summary
    again = kept.get(Reforecast)
    print(
        json.dumps(
            {
                "memory_forecast": forecast["peak_memory_bytes"],
                "memory_measured": peak_resident_bytes(),
                "memory_at_end_of_training": at_trained,
                "memory_parts": forecast["memory"],
                "seconds_forecast": forecast["total_seconds"],
                "seconds_after_20_steps": again.seconds if again else None,
                "seconds_measured": summary["total_seconds"],
                "comparison_forecast": forecast["comparison_seconds"],
                "comparison_measured": kept[Compared].seconds,
            }
        )
    )


def _errors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Forecast over measured minus one, in percent, for each row and over all."""
    pairs = {
        "memory": ("memory_forecast", "memory_measured"),
        "seconds": ("seconds_forecast", "seconds_measured"),
        "seconds_after_20_steps": ("seconds_after_20_steps", "seconds_measured"),
    }
    for row in rows:
        for name, (forecast, measured) in pairs.items():
            value = row[forecast]
            row[f"{name}_error_percent"] = value and round(100 * (value / row[measured] - 1), 1)
    result = {}
    for name in pairs:
        errors = [
            abs(row[f"{name}_error_percent"]) for row in rows if row[f"{name}_error_percent"] is not None
        ]
        if errors:
            result[f"{name}_worst_percent"] = max(errors)
            result[f"{name}_median_percent"] = round(statistics.median(errors), 1)
            result[f"{name}_within_15"] = f"{sum(error <= 15 for error in errors)} of {len(errors)}"
    return result


def _print(report: dict[str, Any]) -> None:
    print(f"{'run':<26}{'memory, MB':>22}{'':>8}{'seconds':>18}{'':>8}{'after 20 steps':>16}")
    for row in report["rows"]:
        seconds = f"{row['seconds_forecast']:.1f} / {row['seconds_measured']:.1f}"
        again = row["seconds_after_20_steps"]
        print(
            f"{row['name']:<26}{_memory(row):>22}{_percent(row['memory_error_percent']):>8}"
            f"{seconds:>18}{_percent(row['seconds_error_percent']):>8}"
            f"{'' if again is None else f'{again:.1f}':>8}"
            f"{_percent(row['seconds_after_20_steps_error_percent']):>8}"
        )
    print("forecast / measured; load average", report["machine"]["load_average"])
    for key, value in report.items():
        if key not in ("rows", "machine", "versions"):
            print(f"{key:<36}{value}")


def _memory(row: dict[str, Any]) -> str:
    return f"{row['memory_forecast'] / 1e6:,.0f} / {row['memory_measured'] / 1e6:,.0f}"


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:+.1f} %"


if __name__ == "__main__":
    main()
