"""Make the bundled demo data set: customer messages in, compact JSON tickets out.

Usage: python tools/make_demo_data.py [--check]
The files depend on the seed alone; `--check` fails where the committed files differ from what this makes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from demo_task.phrases import ACTIONS, CLOSINGS, GREETINGS, ISSUES, ORDERS, URGENCIES, worded
from demo_task.products import product

OUT = Path(__file__).parent.parent / "src" / "phinetune" / "data" / "demo"
SYSTEM = "Turn the message into a ticket."
NUM_ROWS = {"train": 2000, "test": 200}
SEED = 20240
QUESTION_WORDS = ("can", "could", "is", "what", "where")
Row = dict[str, list[dict[str, str]]]


def order_number(rng: random.Random, test: bool) -> str:
    """Four to six digits; numbers of test rows end in 7, those of training rows never do."""
    head = str(rng.randint(1, 9)) + "".join(rng.choices("0123456789", k=rng.randint(2, 4)))
    return head + ("7" if test else rng.choice("012345689"))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _grouped(rng: random.Random, clauses: list[str]) -> list[list[str]]:
    """Clauses joined into sentences: three times in five each stands alone."""
    sentences = [[clauses[0]]]
    for clause in clauses[1:]:
        if rng.random() < 0.4 and len(sentences[-1]) < 2:
            sentences[-1].append(clause)
        else:
            sentences.append([clause])
    return sentences


def message(rng: random.Random, ticket: dict[str, str], test: bool) -> str:
    """One to four sentences that say every field of the ticket, in varying order."""
    tables = (ISSUES[ticket["issue"]], ORDERS, ACTIONS[ticket["action"]], URGENCIES[ticket["urgency"]])
    issue, order, action, urgency = (
        worded(rng.choice(clauses.half(test)), rng).format(p=ticket["product"], o=ticket["order"])
        for clauses in tables
    )
    clauses = rng.choice(([issue, order, action], [order, issue, action], [issue, action, order]))
    if urgency:
        clauses = [*clauses, urgency] if rng.random() < 0.75 else [urgency, *clauses]
    text = ""
    for sentence in _grouped(rng, clauses):
        mark = "?" if sentence[-1].split()[0] in QUESTION_WORDS else "."
        text += (
            " "
            + _capital(sentence[0] + "".join(rng.choice((", ", " and ")) + c for c in sentence[1:]))
            + mark
        )
    return " ".join(
        part
        for part in (rng.choice(GREETINGS.half(test)), text.strip(), rng.choice(CLOSINGS.half(test)))
        if part
    )


def row(rng: random.Random, name: str, test: bool) -> Row:
    """One conversation about the product `name`."""
    ticket = {
        "product": name,
        "order": order_number(rng, test),
        "issue": rng.choice(list(ISSUES)),
        "action": rng.choice(list(ACTIONS)),
        "urgency": rng.choice(list(URGENCIES)),
    }
    answer = json.dumps(ticket, separators=(",", ":"))
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message(rng, ticket, test)},
            {"role": "assistant", "content": answer},
        ]
    }


def make(split: str) -> list[Row]:
    """All rows of `train` or `test`; no product twice."""
    test = split == "test"
    rng = random.Random(f"{SEED} {split}")
    names: dict[str, None] = {}
    while len(names) < NUM_ROWS[split]:
        names[product(rng, test)] = None
    return [row(rng, name, test) for name in names]


def lines(rows: list[Row]) -> str:
    """JSON Lines."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed files and write nothing"
    )
    check = parser.parse_args().check
    for split in NUM_ROWS:
        path, text = OUT / f"{split}.json", lines(make(split))
        if check and (not path.exists() or path.read_text("utf-8") != text):
            raise SystemExit(f"{path.name} differs from what this tool makes: run it without --check")
        if not check:
            OUT.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        print(f"{path.name}: {NUM_ROWS[split]} rows {'as made' if check else 'written'}")


if __name__ == "__main__":
    main()
