"""What does a cleaning buy? Train on a set as it is and after `data clean`, and compare.

    export PHINETUNE_DATA=...                       the folder of the data sets
    python benchmarks/data_clean.py [--classes 12] [--rows 900] [--json]     with planted damage
    python benchmarks/data_clean.py --messy [--rows 2000] [--json]           a set as people left it

Runs of the bundled base, all judged on the same test rows, once with as many epochs and once with as many
steps as the rows before cleaning, some of which stand several times, were given.

Planted: customers' questions of BANKING77, in which a seed spells a quarter of the labels otherwise, puts an
assistant's refusal in the place of a seventh, web remnants into a fifth, repeats a tenth three times and a
tenth under a wrong label. These are kinds that the rules know, and the test rows are sound: the figure says
what the rules are worth there, not what is wrong with your data.

Messy: customers' turns of MultiDoGO's airline with the intents that crowd workers gave them. Its test rows
are as messy as its training rows: the same words come again and again, not always under the same intent.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from real_data import train, whole_set
from real_data_sets import Pair, pairs, sampled, write_chats

from phinetune.data.changing.cleaning import CleanOptions, chosen_rules
from phinetune.data.changing.versions import clean_file
from phinetune.data.checking import CheckOptions, check_file
from phinetune.data.rules.balance import label_key
from phinetune.generation.model import OWN
from phinetune.runs.project import create_project

NUM_MESSY_TESTS = 500
REFUSALS = (
    "As an AI language model, I cannot access your account. Please contact your bank.",
    "I'm just an AI assistant, so I am unable to help with bank cards.",
    "As an AI, I do not have personal experience with banks.",
)


def damaged(rows: list[Pair], rng: random.Random) -> tuple[list[Pair], Counter[str]]:
    """The rows with faults in them, shuffled; and how many of each kind."""
    labels = sorted({row.answer for row in rows})
    planted: Counter[str] = Counter()
    found: list[Pair] = []
    for row in rows:
        prompt, answer = row.prompt, row.answer
        kind = rng.random()
        if kind < 0.25:
            spellings = (answer.upper(), answer.title(), answer.replace(" ", "_"), f"{answer}.")
            answer = rng.choice(spellings)
            planted["label spelt otherwise"] += 1
        elif kind < 0.39:
            answer = rng.choice(REFUSALS)
            planted["refusal for an answer"] += 1
        if rng.random() < 0.2:
            prompt = f"<div class='msg'><p>{prompt}</p>&nbsp;</div>"
            planted["web page remnants"] += 1
        found.append(Pair(prompt, answer))
        copies = rng.random()
        if copies < 0.1:
            found += [Pair(prompt, answer)] * 3
            planted["rows standing three times more"] += 1
        elif copies < 0.2:
            found.append(Pair(prompt, rng.choice([label for label in labels if label != row.answer])))
            planted["copies under a wrong label"] += 1
    rng.shuffle(found)
    return found, planted


def trained(folder: Path, train_file: Path, test: list[Pair], seed: int, epochs: float) -> dict[str, Any]:
    """Train on a file and answer the test rows: right to the letter, and right but for the spelling."""
    import phinetune

    test_file = folder.with_suffix(".test.jsonl")
    write_chats(test, test_file)
    create_project(folder, whole_set(seed=seed, epochs=epochs), train=train_file, test=test_file)
    began = time.perf_counter()
    summary = train(folder, {})
    seconds = time.perf_counter() - began
    model = phinetune.load(folder / "runs" / "benchmark")
    answers = model.answers([row.prompt for row in test], (OWN,), max_new_tokens=24)[OWN]
    right = sum(answer.strip() == row.answer for answer, row in zip(answers, test, strict=True))
    alike = sum(label_key(answer) == label_key(row.answer) for answer, row in zip(answers, test, strict=True))
    with train_file.open(encoding="utf-8") as file:
        num_rows = sum(1 for _ in file)
    return {
        "rows": num_rows,
        "steps": summary["steps"],
        "seconds": round(seconds),
        "exact": round(right / len(test), 4),
        "exact_but_for_spelling": round(alike / len(test), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messy", action="store_true", help="MultiDoGO as it is, nothing planted")
    parser.add_argument("--classes", type=int, default=12, help="of BANKING77")
    parser.add_argument("--rows", type=int, default=900)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="data-clean-") as name:
        result = (messy if options.messy else planted_damage)(Path(name), options)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        if key != "runs":
            print(f"{key:30} {value}")
    print(f"{'':21} {'rows':>6} {'steps':>6} {'s':>6} {'right':>8} {'but for spelling':>17}")
    for arm, run in result["runs"].items():
        print(
            f"{arm:21} {run['rows']:6} {run['steps']:6} {run['seconds']:6} {run['exact']:8.1%} "
            f"{run['exact_but_for_spelling']:17.1%}"
        )


def planted_damage(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(options.seed)
    every = pairs("banking77", "train")
    labels = set(rng.sample(sorted({row.answer for row in every}), options.classes))
    rows = sampled([row for row in every if row.answer in labels], options.rows, options.seed)
    test = [row for row in pairs("banking77", "test") if row.answer in labels]
    bad_rows, planted = damaged(rows, rng)
    write_chats(rows, folder / "sound.jsonl")
    write_chats(bad_rows, folder / "damaged.jsonl")
    sound = trained(folder / "sound", folder / "sound.jsonl", test, options.seed, options.epochs)
    result = before_and_after(folder, folder / "damaged.jsonl", test, options)
    return {"planted": dict(planted), **result, "runs": {"sound": sound, **result["runs"]}}


def messy(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    # Rows without text are refused in training, with or without a cleaning.
    every = [row for row in pairs("multidogo", "train") if row.prompt.strip()]
    rows = sampled(every, options.rows, options.seed)
    test = sampled(pairs("multidogo", "test"), NUM_MESSY_TESTS, options.seed)
    write_chats(rows, folder / "airline.jsonl")
    result = before_and_after(folder, folder / "airline.jsonl", test, options)
    # What people say often is asked for often: here copies are no fault.
    rules = chosen_rules((), ("conflicting_answers",), ("exact_duplicate", "near_duplicate"))
    kept = clean_file(folder / "airline.jsonl", folder / "copies-kept", CleanOptions(rules=rules))
    after = folder / "copies-kept" / "airline.jsonl"
    run = trained(folder / "with-copies", after, test, options.seed, options.epochs)
    return {
        **result,
        "left_out_with_copies_kept": kept.dropped,
        "runs": {**result["runs"], "cleaned, copies kept": run},
    }


def before_and_after(
    folder: Path, file: Path, test: list[Pair], options: argparse.Namespace
) -> dict[str, Any]:
    """What is found in a file, what a cleaning does, and runs on it before and after."""
    before = check_file(file, CheckOptions())
    rules = chosen_rules((), ("conflicting_answers",), ())
    cleaned = clean_file(file, folder / "clean", CleanOptions(rules=rules))
    again = clean_file(cleaned.file or folder, folder / "again", CleanOptions(rules=rules))
    after = folder / "clean" / file.name
    runs = {
        "as it is": trained(folder / "as-it-is", file, test, options.seed, options.epochs),
        "cleaned": trained(folder / "cleaned", after, test, options.seed, options.epochs),
    }
    # Copies are steps too: the same number of steps tells rows from practice.
    epochs = round(options.epochs * runs["as it is"]["steps"] / runs["cleaned"]["steps"], 1)
    runs["cleaned, more epochs"] = trained(folder / "more-epochs", after, test, options.seed, epochs)
    return {
        "test_rows": len(test),
        "found": dict(before.counts),
        "left_out": cleaned.dropped,
        "repaired": cleaned.changed,
        "changes_of_a_second_cleaning": len(again.changes),
        "runs": runs,
    }


if __name__ == "__main__":
    main()
