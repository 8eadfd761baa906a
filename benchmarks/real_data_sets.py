"""Public data sets as chats: which files, how a record becomes a question and an answer.

The files are not part of this project; PHINETUNE_DATA names the folder that holds them (plain, or
compressed as .xz), laid out as `SETS` says. Knows nothing of models or training.
"""

from __future__ import annotations

import csv
import json
import lzma
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True, slots=True)
class Pair:
    """What is asked and what should be answered."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where a set's files lie under PHINETUNE_DATA and how they are read."""

    train: str
    test: str
    read: Callable[[Path, str], Iterator[Pair]]
    meaning: str


def pairs(name: str, part: str) -> list[Pair]:
    """All pairs of the "train" or "test" part, in file order."""
    found = SETS[name]
    return list(found.read(_data_folder() / getattr(found, part), part))


def sampled(found: list[Pair], limit: int, seed: int) -> list[Pair]:
    """At most `limit` pairs, drawn and ordered by the seed; 0 takes all."""
    rows = list(found)
    random.Random(seed).shuffle(rows)
    return rows[:limit] if limit else rows


def e2e_references() -> dict[str, list[str]]:
    """Every distinct meaning representation of E2E's test set, with all its reference sentences."""
    references: dict[str, list[str]] = {}
    for pair in pairs("e2e", "test"):
        references.setdefault(pair.prompt, []).append(pair.answer)
    return references


def write_chats(found: list[Pair], path: Path) -> None:
    """One conversation per line, in the JSON Lines chat form."""
    with path.open("w", encoding="utf-8") as file:
        for pair in found:
            messages = [
                {"role": "user", "content": pair.prompt},
                {"role": "assistant", "content": pair.answer},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _columns(prompt: str, answer: str, *, words: bool = False) -> Callable[[Path, str], Iterator[Pair]]:
    """A CSV file with a header; `words` turns a label such as card_arrival into words."""

    def read(path: Path, part: str) -> Iterator[Pair]:
        with _opened(path) as file:
            for row in csv.DictReader(file):
                text = row[answer].strip()
                yield Pair(row[prompt].strip(), text.replace("_", " ") if words else text)

    return read


def _json_lines(prompt: str, answer: str) -> Callable[[Path, str], Iterator[Pair]]:
    def read(path: Path, part: str) -> Iterator[Pair]:
        with _opened(path) as file:
            for line in file:
                row = json.loads(line)
                yield Pair(row[prompt], row[answer])

    return read


def _clinc(path: Path, part: str) -> Iterator[Pair]:
    """One JSON object with all parts: lists of [text, intent]."""
    with _opened(path) as file:
        content: dict[str, Any] = json.load(file)
    for text, intent in content[part] + content[f"oos_{part}"]:
        yield Pair(text, "out of scope" if intent == "oos" else intent.replace("_", " "))


def _multidogo(path: Path, part: str) -> Iterator[Pair]:
    """A table of customers' turns; those of the airline, as their annotators left them."""
    with _opened(path) as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if row["split"] == part and row["domain"] == "airline":
                yield Pair(row["utterance"], row["intent"])


SETS: Mapping[str, DataSet] = {
    "banking77": DataSet(
        "intents/banking77.train.csv",
        "intents/banking77.test.csv",
        _columns("text", "category", words=True),
        "a customer's message -> one of 77 intents",
    ),
    "clinc150": DataSet(
        "intents/clinc150.data_full.json",
        "intents/clinc150.data_full.json",
        _clinc,
        "a request to an assistant -> one of 150 intents, or out of scope",
    ),
    "e2e": DataSet(
        "e2e-nlg/trainset.csv",
        "e2e-nlg/testset_w_refs.csv",
        _columns("mr", "ref"),
        "facts about a restaurant -> a sentence (the LoRA paper's task)",
    ),
    "gsm8k": DataSet(
        "gsm8k/train.jsonl",
        "gsm8k/test.jsonl",
        _json_lines("question", "answer"),
        "a word problem -> steps and the number",
    ),
    "multidogo": DataSet(
        "intents/multidogo.turn_level.tsv",
        "intents/multidogo.turn_level.tsv",
        _multidogo,
        "a customer's turn in an airline's chat -> its intent, as crowd workers labelled it",
    ),
    "scan": DataSet(
        "text2struct/scan.simple.train.jsonl",
        "text2struct/scan.simple.test.jsonl",
        _json_lines("in", "out"),
        "a command in words -> a sequence of actions",
    ),
}


def _opened(path: Path) -> TextIO:
    compressed = path.with_name(path.name + ".xz")
    if path.is_file():
        return path.open(encoding="utf-8", newline="")
    if compressed.is_file():
        return lzma.open(compressed, "rt", encoding="utf-8", newline="")
    sys.exit(
        f"there is no {path} (nor {compressed.name}); PHINETUNE_DATA must name the folder of the data sets"
    )


def _data_folder() -> Path:
    name = os.environ.get("PHINETUNE_DATA")
    if not name:
        sys.exit("set PHINETUNE_DATA to the folder that holds the data sets (see benchmarks/README.md)")
    return Path(name)
