"""Every rule finds 95 % and more of the faults planted for it; 95 % and more of what it names is planted."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_faults import BROKEN, IN_ROWS, NOUNS, Sentences, broken, chat, content

from phinetune.data.checking import CheckOptions, CheckReport, check_file
from phinetune.data.conversation import Conversation, Example
from phinetune.data.rules.catalog import LOOKING, READING
from phinetune.data.rules.lengths import TokenCount

PLANTED_EACH, NUM_CLEAN = 40, 1200
LEAST = 0.95


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8"
    )
    return path


def lines_by_rule(report: CheckReport) -> dict[str, set[int]]:
    found: dict[str, set[int]] = defaultdict(set)
    for finding in report.findings:
        found[finding.rule].add(finding.line)
    return found


def table(name: str, figures: dict[str, tuple[float, float, int]]) -> None:
    print(f"\n{name}\n  {'rule':22} {'recall':>7} {'precision':>10} {'planted':>8}")
    for rule, (recall, precision, count) in figures.items():
        print(f"  {rule:22} {recall:7.1%} {precision:10.1%} {count:8}")


def judged(planted: dict[str, set[int]], found: dict[str, set[int]]) -> dict[str, tuple[float, float, int]]:
    return {
        rule: (
            len(lines & found[rule]) / len(lines),
            len(lines & found[rule]) / len(found[rule]) if found[rule] else 0.0,
            len(lines),
        )
        for rule, lines in planted.items()
    }


def demand(figures: dict[str, tuple[float, float, int]]) -> None:
    weak = {rule: figure for rule, figure in figures.items() if min(figure[:2]) < LEAST}
    assert not weak


Piece = tuple[str, list[str]]


def mixed(rng: random.Random, pieces: list[Piece]) -> tuple[list[str], dict[str, set[int]]]:
    """The pieces in a random order, and on which line the fault of each stands: the last of its piece."""
    rng.shuffle(pieces)
    rows: list[str] = []
    planted: dict[str, set[int]] = defaultdict(set)
    for rule, lines in pieces:
        rows += lines
        if rule:
            planted[rule].add(len(rows))
    return rows, planted


def test_rules_that_look_at_rows(tmp_path: Path) -> None:
    rng, sentences = random.Random(5), Sentences()
    pieces = [("", [json.dumps(sentences.row())]) for _ in range(NUM_CLEAN)]
    for rule, plant in IN_ROWS.items():
        # Findings of outliers and languages must stay rare to be findings.
        count = PLANTED_EACH if rule not in ("language_mix", "length_outlier") else 25
        pieces += [(rule, plant(sentences.row(), rng, sentences)) for _ in range(count)]
    rows, planted = mixed(rng, pieces)
    figures = judged(planted, lines_by_rule(check_file(write(tmp_path / "train.jsonl", rows))))
    table("rules that look at rows", figures)
    demand(figures)


def test_rules_of_reading(tmp_path: Path) -> None:
    rng, sentences = random.Random(6), Sentences()
    pieces = [("", [json.dumps(sentences.row())]) for _ in range(NUM_CLEAN)]
    for kind in BROKEN:
        # A broken object could swallow what follows: a blank line does not help it, a sound row must.
        pieces += [(kind, [broken(kind, sentences.row())]) for _ in range(20)]
    rows, planted = mixed(rng, pieces)
    figures = judged(planted, lines_by_rule(check_file(write(tmp_path / "train.jsonl", rows))))
    table("rules of reading", figures)
    demand(figures)


def plain_lines(rng: random.Random) -> list[str]:
    return [json.dumps(row) for row in plain(rng, 12)]


def table_lines(rng: random.Random) -> list[str]:
    sentences = Sentences(rng)
    return ["prompt,answer"] + [f'"{sentences.question()}","{sentences.answer()}"' for _ in range(12)]


def file_without(path: Path, rng: random.Random) -> Path:
    """Nothing at all."""
    return path.with_name(f"none-{rng.random()}.jsonl")


def file_folder(path: Path, rng: random.Random) -> Path:
    return path.parent


def file_empty(path: Path, rng: random.Random) -> Path:
    path.write_bytes(b"" if rng.random() < 0.5 else b"\n \n")
    return path


def file_cut(path: Path, rng: random.Random) -> Path:
    packed = gzip.compress("\n".join(plain_lines(rng)).encode())
    path.write_bytes(packed[: rng.randrange(len(packed) // 2, len(packed) - 1)])
    return path


def file_of_two_encodings(path: Path, rng: random.Random) -> Path:
    lines = [line.encode() for line in plain_lines(rng)]
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(chat("Où est le café ?", "Là-bas."), ensure_ascii=False).encode("cp1252")
    path.write_bytes(b"\n".join(lines))
    return path


def file_with_a_stray_key(path: Path, rng: random.Random) -> Path:
    lines = plain_lines(rng)
    place = rng.randrange(len(lines))
    lines[place] = json.dumps({**json.loads(lines[place]), rng.choice(["source", "mesage", "id"]): "x"})
    path.write_text("\n".join(lines), "utf-8")
    return path


def table_with_two_columns_of_a_name(path: Path, rng: random.Random) -> Path:
    path = path.with_suffix(".csv")
    path.write_text("\n".join(["prompt,prompt", *table_lines(rng)[1:]]), "utf-8")
    return path


def table_with_a_long_row(path: Path, rng: random.Random) -> Path:
    path = path.with_suffix(".csv")
    lines = table_lines(rng)
    lines[rng.randrange(1, len(lines))] += ",one,too many"
    path.write_text("\n".join(lines), "utf-8")
    return path


def device(path: Path, rng: random.Random) -> Path:
    return Path(os.devnull)


FILES: dict[str, Callable[[Path, random.Random], Path]] = {
    "missing": file_without,
    "is_folder": file_folder,
    "no_file": device,
    "empty": file_empty,
    "damaged": file_cut,
    "encoding": file_of_two_encodings,
    "unknown_key": file_with_a_stray_key,
    "columns": table_with_two_columns_of_a_name,
    "table": table_with_a_long_row,
}


def test_rules_of_whole_files(tmp_path: Path) -> None:
    """20 files of each fault, and as many sound ones in the same two forms."""
    planted: dict[str, set[int]] = {rule: set() for rule in FILES}
    found: dict[str, set[int]] = defaultdict(set)
    rng, number = random.Random(12), 0
    for rule, make in FILES.items():
        for _ in range(20):
            sound = tmp_path / "sound.csv" if rule in ("columns", "table") else tmp_path / "sound.jsonl"
            lines = table_lines(rng) if sound.suffix == ".csv" else plain_lines(rng)
            sound.write_text("\n".join(lines), "utf-8")
            for path in (make(tmp_path / "train.jsonl", rng), sound):
                number += 1
                if path != sound:
                    planted[rule].add(number)
                for name in check_file(path).counts:
                    found[name].add(number)
    figures = judged(planted, found)
    table("rules of whole files", figures)
    demand(figures)


def test_conflicting_labels(tmp_path: Path) -> None:
    rng, sentences = random.Random(8), Sentences()
    labels = ["joy", "anger", "fear"]
    pieces = [("", [json.dumps(chat(sentences.sentence(), rng.choice(labels)))]) for _ in range(NUM_CLEAN)]
    for _ in range(PLANTED_EACH):
        text, (one, other) = sentences.sentence(), rng.sample(labels, 2)
        pieces.append(
            ("conflicting_answers", [json.dumps(chat(text, one)), json.dumps(chat(text.lower(), other))])
        )
    for _ in range(PLANTED_EACH):
        words = (sentences.sentence() + " " + sentences.answer()).split()
        place = next(index for index, word in enumerate(words) if len(word) > 5 and word.isalpha())
        swapped = words[place][:2] + words[place][3] + words[place][2] + words[place][4:]
        respelt = " ".join([*words[:place], swapped, *words[place + 1 :]])
        pair = [json.dumps(chat(" ".join(words), "joy")), json.dumps(chat(respelt, "fear"))]
        pieces.append(("conflicting_answers", pair))
    rows, planted = mixed(rng, pieces)
    figures = judged(planted, lines_by_rule(check_file(write(tmp_path / "train.jsonl", rows))))
    table("conflicting labels", figures)
    demand(figures)


def test_leaks_from_a_test_set(tmp_path: Path) -> None:
    rng, sentences = random.Random(9), Sentences()
    test = [sentences.row() for _ in range(300)]
    pieces = [("", [json.dumps(sentences.row())]) for _ in range(NUM_CLEAN)]
    for index in range(PLANTED_EACH):
        pieces.append(("leak_row", [json.dumps(test[index])]))
        words = content(test[100 + index], 1).split()
        words[rng.randrange(len(words))] = rng.choice(NOUNS)
        pieces.append(("leak_row", [json.dumps(chat(content(test[100 + index], 0), " ".join(words)))]))
        asked = content(test[200 + index], 0)
        pieces.append(("leak_prompt", [json.dumps(chat(asked.upper(), sentences.answer()))]))
        quoted = " ".join(content(test[250 + index], 1).split()[3:17])
        pieces.append(
            ("leak_overlap", [json.dumps(chat(sentences.question(), f"{sentences.answer()} {quoted}"))])
        )
    rows, planted = mixed(rng, pieces)
    # A copied row has a copied prompt too.
    planted["leak_prompt"] |= planted["leak_row"]
    options = CheckOptions(test_file=write(tmp_path / "test.jsonl", test))
    figures = judged(planted, lines_by_rule(check_file(write(tmp_path / "train.jsonl", rows), options)))
    table("leaks from a test set", figures)
    demand(figures)


def first_words(example: Example, count: int) -> int:
    assert isinstance(example, Conversation)
    return sum(len(message.content.split()[:count]) for message in example.messages)


def test_rules_with_what_is_handed_in(tmp_path: Path) -> None:
    """Words stand for tokens, a word for harm, and a number in the text for a loss."""
    rng, sentences = random.Random(10), Sentences()
    limit = 150

    def count_tokens(example: Example) -> TokenCount:
        assert isinstance(example, Conversation)
        prompt, answer = (len(message.content.split()) for message in example.messages)
        lost = min(answer, max(0, prompt + answer - limit))
        return TokenCount(
            num_tokens=prompt + answer, num_trained=answer, num_trained_lost=lost,
            num_lost=max(0, prompt + answer - limit),
        )  # fmt: skip

    def loss_of(example: Example) -> float:
        assert isinstance(example, Conversation)
        return 9.0 + rng.random() if "mislabelled" in example.messages[1].content else 2 + rng.random() * 0.5

    pieces = [("", [json.dumps(sentences.row())]) for _ in range(600)]
    for _ in range(PLANTED_EACH):
        long = " ".join(sentences.answer() for _ in range(8))
        pieces.append(("over_long", [json.dumps(chat(sentences.question(), long))]))
        pieces.append(("no_trained_token", [json.dumps(chat(long, "Yes, of course."))]))
        pieces.append(("toxic", [json.dumps(chat(sentences.question(), sentences.answer() + " Harm."))]))
        pieces.append(
            ("label_noise", [json.dumps(chat(sentences.question(), sentences.answer() + " mislabelled"))])
        )
    rows, planted = mixed(rng, pieces)
    options = CheckOptions(
        count_tokens=count_tokens,
        loss_of=loss_of,
        judge=lambda text: "violence, high" if "Harm." in text else "",
    )
    figures = judged(planted, lines_by_rule(check_file(write(tmp_path / "train.jsonl", rows), options)))
    table("rules with what is handed in", figures)
    demand(figures)


def classes(rng: random.Random, shares: dict[str, int]) -> list[Any]:
    sentences = Sentences(rng)
    rows = [chat(sentences.sentence(), label) for label, count in shares.items() for _ in range(count)]
    rng.shuffle(rows)
    return rows


def plain(rng: random.Random, count: int = 120) -> list[Any]:
    sentences = Sentences(rng)
    return [sentences.row() for _ in range(count)]


def same_answer(rng: random.Random) -> list[Any]:
    sentences = Sentences(rng)
    answer = sentences.answer()
    return plain(rng) + [chat(sentences.question(), answer) for _ in range(20)]


def template(rng: random.Random) -> list[Any]:
    sentences = Sentences(rng)
    return [
        chat(sentences.question(), "Thank you for asking. " + sentences.answer()) for _ in range(100)
    ] + plain(rng, 40)


def low_variety(rng: random.Random) -> list[Any]:
    words = [rng.choice(NOUNS) for _ in range(5)]
    sentences = Sentences(rng)
    return [chat(sentences.question(), " ".join(rng.choice(words) for _ in range(40))) for _ in range(80)]


def one_sentence(rng: random.Random) -> list[Any]:
    sentences = Sentences(rng)
    return [
        chat(f"Where could a visitor buy the cheapest {rng.choice(NOUNS)} today?", sentences.answer())
        for _ in range(100)
    ] + plain(rng, 60)


def stereotype(rng: random.Random, is_skewed: bool = True) -> list[Any]:
    sentences = Sentences(rng)
    rows = []
    for number in range(120):
        word, group = ("nurse", "She") if number % 2 else ("engineer", "He")
        if not is_skewed and rng.random() < 0.5:
            group = {"She": "He", "He": "She"}[group]
        rows.append(chat(sentences.question(), f"{sentences.answer()} {group} works as {word}."))
    return rows


EVEN = {"joy": 60, "anger": 55, "fear": 58}
# rule: (files with the fault, files without it)
OF_FILES: dict[str, tuple[Callable[[random.Random], list[Any]], Callable[[random.Random], list[Any]]]] = {
    "class_imbalance": (
        lambda rng: classes(rng, {"joy": 200, "anger": 12, "fear": 30}),
        lambda rng: classes(rng, EVEN),
    ),
    "rare_class": (lambda rng: classes(rng, {**EVEN, "awe": 3}), lambda rng: classes(rng, EVEN)),
    "label_spelling": (
        # One answer that is no label hides nothing.
        lambda rng: [*classes(rng, {**EVEN, "Joy": 9}), *plain(rng, 1)],
        lambda rng: classes(rng, EVEN),
    ),
    "same_answer": (same_answer, plain),
    "template_share": (template, plain),
    "low_variety": (low_variety, plain),
    "few_clusters": (one_sentence, plain),
    "stereotype_skew": (stereotype, lambda rng: stereotype(rng, is_skewed=False)),
    "too_few_rows": (lambda rng: plain(rng, rng.randint(1, 9)), lambda rng: plain(rng, rng.randint(10, 40))),
    "few_rows": (lambda rng: plain(rng, rng.randint(10, 60)), lambda rng: plain(rng, 1000)),
}


@pytest.mark.parametrize("rule", OF_FILES)
def test_rules_that_look_at_files(rule: str, tmp_path: Path) -> None:
    faulty, sound = OF_FILES[rule]
    rounds = 6 if rule == "few_rows" else 20
    hits = [
        rule in check_file(write(tmp_path / "a.jsonl", faulty(random.Random(seed)))).counts
        for seed in range(rounds)
    ]
    alarms = [
        rule in check_file(write(tmp_path / "a.jsonl", sound(random.Random(seed)))).counts
        for seed in range(rounds)
    ]
    recall = sum(hits) / rounds
    precision = sum(hits) / max(sum(hits) + sum(alarms), 1)
    table("rules that look at files", {rule: (recall, precision, rounds)})
    demand({rule: (recall, precision, rounds)})


def test_every_rule_is_measured() -> None:
    handed_in = {"over_long", "no_trained_token", "toxic", "label_noise"}
    of_two_files = {"leak_row", "leak_prompt", "leak_overlap", "conflicting_answers"}
    assert {rule.id for rule in LOOKING} <= handed_in | of_two_files | IN_ROWS.keys() | OF_FILES.keys()
    # A row of 64 MiB, and a file that may not be opened: neither is planted 20 times.
    elsewhere = {"too_long", "unreadable"}
    assert {rule.id for rule in READING} - elsewhere <= {*BROKEN} | IN_ROWS.keys() | FILES.keys()
