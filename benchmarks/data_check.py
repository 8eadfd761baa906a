"""How long and how large is the check of a data file? Writes rows from a seed, checks them, measures.

Usage: python benchmarks/data_check.py [--rows N] [--json]

The rows are made-up chats of 60 to 120 words; 2 % stand twice, 3 % nearly twice, 1 % hold an address or a
number of a person. Recall counts the near-duplicates that were planted at a likeness of 0.8 and more.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from machine import machine, versions

from phinetune.data.checking import CheckOptions, check_file

SYLLABLES = [first + second for first in "bdfgklmnprst" for second in "aeio"]


def word(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 4)))


def write_rows(path: Path, num_rows: int, seed: int) -> None:
    """Write the rows one by one; only the last thousand are remembered, to repeat some of them."""
    rng = random.Random(seed)
    vocabulary = [word(rng) for _ in range(20_000)]
    recent: list[tuple[list[str], list[str]]] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            kind = rng.random()
            prompt = [rng.choice(vocabulary) for _ in range(rng.randint(15, 30))]
            answer = [rng.choice(vocabulary) for _ in range(rng.randint(45, 90))]
            if recent and kind < 0.05:
                prompt, answer = (list(part) for part in rng.choice(recent))
                for _ in range(0 if kind < 0.02 else rng.randint(1, 4)):
                    answer[rng.randrange(len(answer))] = rng.choice(vocabulary)
            elif kind < 0.06:
                answer[-1] = rng.choice([f"person{number}@example.org", f"+44 20 7946 0{number % 1000:03d}"])
            recent = [*recent[-999:], (prompt, answer)] if number % 7 == 0 else recent
            messages = [
                {"role": "user", "content": " ".join(prompt) + "?"},
                {"role": "assistant", "content": " ".join(answer) + "."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--no-duplicates", action="store_true", help="leave the search for rows alike out")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        write_rows(path, options.rows, options.seed)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, start_cpu = time.perf_counter(), time.process_time()
        report = check_file(path, CheckOptions(with_duplicates=not options.no_duplicates))
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
        size_mb = path.stat().st_size / 1e6
    # Kilobytes on Linux, bytes on macOS.
    unit = 1e6 if sys.platform == "darwin" else 1e3
    result = {
        "rows": options.rows,
        "file_mb": round(size_mb, 1),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_s, 1),
        "rows_per_second": round(options.rows / seconds),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit),
        "memory_before_mb": round(before / unit),
        "exact_duplicates": report.num_exact_duplicates,
        "near_duplicates": report.num_near_duplicates,
        "private_rows": report.counts.get("private_data", 0),
        "machine": machine(1),
        "versions": versions(("phinetune", "numpy")),
    }
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:18} {value:,}" if isinstance(value, int | float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
