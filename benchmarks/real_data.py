"""Real data through the whole road: make a project, train it, and set base against adapter.

    export PHINETUNE_DATA=...                                  the folder of the data sets
    python benchmarks/real_data.py --set banking77 --out DIR --train
    python benchmarks/real_data.py --set e2e --rows 8000 --out DIR --bleu

--bleu (E2E only) answers each distinct meaning representation of the test set once and scores it against
all its references, for our adapter and for one trained on the same rows by PEFT and transformers alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from real_data_sets import SETS, Pair, e2e_references, pairs, sampled, write_chats

from phinetune.runs.project import SETTINGS_FILE, create_project
from phinetune.training.settings import QUICKSTART, TrainingSettings

# One epoch over sentences needs no pauses to look; GSM8K's answers are long.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "banking77": {"epochs": 3.0},
    "clinc150": {"epochs": 3.0},
    "e2e": {"epochs": 1.0},
    "multidogo": {"epochs": 3.0},
    "gsm8k": {"epochs": 1.0, "finetune_train_seqlen": 1024, "finetune_test_seqlen": 1024},
    "scan": {"epochs": 1.0},
}
NO_LIMIT = 1_000_000
MAX_NEW_TOKENS = 96


def main() -> None:
    options = _options()
    out = Path(options.out)
    project = make_project(options.set, out, options.rows, options.test_rows, options.seed)
    print(
        f"{out}: {project.num_train} training rows, {project.num_test} test rows: {SETS[options.set].meaning}"
    )
    if not (options.train or options.bleu):
        return
    overrides = dict(text.split("=", 1) for text in options.setting)
    summary = train(out, overrides)
    report: dict[str, Any] = {"data": options.set, "summary": summary}
    _print_metrics(summary)
    if options.bleu:
        report["bleu"] = bleu(out, overrides)
        _print_bleu(report["bleu"])
    if options.json:
        print(json.dumps(report, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="real data: a project, a run, base against adapter")
    parser.add_argument("--set", required=True, choices=sorted(SETS), help="which data set")
    parser.add_argument("--out", required=True, help="a new project folder")
    parser.add_argument("--rows", type=int, default=0, help="training rows; 0: all")
    parser.add_argument("--test-rows", type=int, default=0, help="test rows; 0: all")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--train", action="store_true", help="train and compare")
    parser.add_argument("--bleu", action="store_true", help="train, and score against PEFT (E2E)")
    parser.add_argument(
        "--setting", action="append", default=[], metavar="KEY=VALUE", help="a line of lora.yaml"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.bleu and options.set != "e2e":
        parser.error("--bleu needs --set e2e: the other sets have one reference each")
    return options


def whole_set(**changes: Any) -> TrainingSettings:
    """The quick start's settings over all rows; the test set is seen before and after and chooses nothing."""
    return TrainingSettings(
        **{
            **QUICKSTART,
            "finetune_train_nsamples": NO_LIMIT,
            "finetune_test_nsamples": NO_LIMIT,
            "evaluation_strategy": "no",
            "overlong": "drop",
            **changes,
        }
    )


def make_project(name: str, out: Path, num_rows: int, num_test_rows: int, seed: int) -> Any:
    """A project folder with `num_rows` sampled training rows (0: all) and settings for this set."""
    test = pairs(name, "test")
    if name == "e2e":  # one row per meaning representation: the others are further references
        test = [Pair(facts, sentences[0]) for facts, sentences in e2e_references().items()]
    settings = whole_set(seed=seed, **CHANGES[name])
    with tempfile.TemporaryDirectory(prefix="real-data-") as folder:
        train_file, test_file = Path(folder) / "train.json", Path(folder) / "test.json"
        write_chats(sampled(pairs(name, "train"), num_rows, seed), train_file)
        write_chats(sampled(test, num_test_rows, seed) if num_test_rows else test, test_file)
        return create_project(out, settings, train=train_file, test=test_file)


def train(project: Path, overrides: Mapping[str, str]) -> dict[str, Any]:
    """The summary of a whole run, with its steps told on standard error."""
    from phinetune.base.events import Finished, Stage, Stepped
    from phinetune.runs.train_run import train_run

    summary: dict[str, Any] = {}
    for event in train_run(project, run_name="benchmark", overrides=overrides):
        if isinstance(event, Stage):
            _say(f"{event.name} {event.detail}")
        elif isinstance(event, Stepped) and event.step % 50 == 0:
            _say(f"step {event.step} of {event.num_steps}, loss {event.loss:.3f}")
        elif isinstance(event, Finished):
            summary = event.summary
    return summary


def bleu(project: Path, overrides: Mapping[str, str]) -> dict[str, Any]:
    """BLEU of our adapter and of PEFT's, over all references; and what both sides' losses were."""
    import sacrebleu
    import torch
    from real_data_peft import generated, mean_loss, trained_by_peft

    import phinetune
    from phinetune.base.files import committed_dir
    from phinetune.data.conversation import Message
    from phinetune.data.reading import load_examples
    from phinetune.generation.model import OWN
    from phinetune.lora.attach import attach
    from phinetune.lora.files import save_adapter
    from phinetune.models.loading import load_base
    from phinetune.runs.prepare import lora_settings, prepare
    from phinetune.training.lora_yaml import load_settings

    settings = load_settings(project / SETTINGS_FILE, overrides)
    prepared = prepare(project, settings)
    references = e2e_references()
    examples = load_examples(Path(prepared.files[1].path))
    asked = [example.messages[0].content for example in examples]  # type: ignore[union-attr]
    used = [references[facts] for facts in asked]

    ours = phinetune.load(project / "runs" / "benchmark")
    began = time.perf_counter()
    our_answers = ours.answers(asked, (OWN,), max_new_tokens=MAX_NEW_TOKENS)[OWN]
    our_seconds = time.perf_counter() - began

    base = load_base(settings.model, device_name="cpu", dtype=settings.dtype, root=project)
    with committed_dir(project / "first-adapter") as folder:
        save_adapter(
            attach(base.model, lora_settings(settings), seed=settings.seed), folder, base_name="", metadata={}
        )
    torch.manual_seed(settings.seed)
    began = time.perf_counter()
    peer, losses = trained_by_peft(
        base.folder, base.dtype, project / "first-adapter", settings, prepared.plan, prepared.train.rendered
    )
    peer_seconds = time.perf_counter() - began
    renderer = prepared.renderer
    peer_ids = generated(
        peer,
        [renderer.prompt([Message(role="user", content=facts)]) for facts in asked],
        max_new_tokens=MAX_NEW_TOKENS,
        stop_ids=renderer.stop_ids,
        pad_id=min(renderer.stop_ids),
    )
    peer_answers = [renderer.decode(ids) for ids in peer_ids]
    scores = {
        side: sacrebleu.corpus_bleu(answers, _by_place(used)).score
        for side, answers in (("ours", our_answers), ("peft", peer_answers))
    }
    return {
        **scores,
        "difference": scores["ours"] - scores["peft"],
        "num_answers": len(asked),
        "num_references": sum(len(sentences) for sentences in used),
        "same_answers": sum(a == b for a, b in zip(our_answers, peer_answers, strict=True)),
        "peft_test_loss": mean_loss(peer, prepared.test.rendered),
        "peft_last_losses": losses[-10:],
        "peft_training_seconds": peer_seconds,
        "our_generation_seconds": our_seconds,
        "sacrebleu": str(sacrebleu.__version__),
    }


def _by_place(references: Sequence[Sequence[str]]) -> list[Any]:
    """sacrebleu's form: the first reference of every answer, then the second, None where there is none."""
    most = max(len(sentences) for sentences in references)
    return [[s[place] if place < len(s) else None for s in references] for place in range(most)]


def _print_metrics(summary: Mapping[str, Any]) -> None:
    evaluation = summary["evaluation"]
    print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, {summary['tokens_per_second']:.0f} tokens/s"
    )
    print(f"{'':<18}{'base':>10}{'adapter':>10}{'difference, 95 %':>28}")
    for name, value in evaluation["base"].items():
        difference = evaluation["difference"].get(name) or {}
        low, high = difference.get("low"), difference.get("high")
        span = f"{low:+.4f} to {high:+.4f}" if low is not None and high is not None else ""
        print(f"{name:<18}{_number(value)}{_number(evaluation['adapter'][name])}{span:>28}")


def _number(value: Any) -> str:
    return f"{value:>10.4f}" if isinstance(value, int | float) else f"{'':>10}"


def _print_bleu(scores: Mapping[str, Any]) -> None:
    print(
        f"BLEU over {scores['num_answers']} answers, {scores['num_references']} references: "
        f"ours {scores['ours']:.2f}, PEFT {scores['peft']:.2f}, difference {scores['difference']:+.2f}; "
        f"{scores['same_answers']} answers are the same; PEFT's test loss {scores['peft_test_loss']:.4f}, "
        f"training {scores['peft_training_seconds']:.0f} s"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
