"""Train the bundled content filter, measure it on texts it never saw, and write weights and card.

    PHINETUNE_DATA=/where/the/data/sets/are python tools/train_content_filter.py

Reads the folder `safety` of $PHINETUNE_DATA (openly licensed sets; the card names them) and two others for
harmless requests. Half of each set, by a hash of the text, is never trained on: the card's figures are
from there. Prints counts and figures, never a row.
"""

from __future__ import annotations

import csv
import json
import lzma
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phinetune.safety.categories import Category, Severity
from phinetune.safety.linear import NUM_BUCKETS, WEIGHTS, LinearClassifier, features

# Share of harmless held-out texts that may reach each severity.
FALSE_ALARMS = {Severity.LOW: 0.05, Severity.MEDIUM: 0.01, Severity.HIGH: 0.002}
CARD = WEIGHTS.with_suffix(".md")


@dataclass(frozen=True, slots=True)
class Row:
    """A text with what is known of it; a category that is not in `labels` was not judged."""

    text: str
    labels: Mapping[Category, bool]
    source: str

    @property
    def is_held_out(self) -> bool:
        return zlib.crc32(self.text.encode()) % 2 == 1


def folder() -> Path:
    data = os.environ.get("PHINETUNE_DATA", "")
    if not data:
        sys.exit("set PHINETUNE_DATA to the folder of data sets")
    return Path(data) / "safety"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _table(path: Path) -> Iterator[dict[str, str]]:
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8", newline="") as lines:
            yield from csv.DictReader(lines)
    else:
        with path.open(encoding="utf-8", newline="") as lines:
            yield from csv.DictReader(lines)


NONE = dict.fromkeys(Category, False)


def moderation(root: Path) -> Iterator[Row]:
    """OpenAI's moderation set: some labels are missing, for not judged."""
    names = {"S": Category.SEXUAL, "H": Category.HATE, "V": Category.VIOLENCE, "SH": Category.SELF_HARM}
    for row in _lines(root / "openai-moderation.jsonl.xz"):
        labels = {category: bool(row[key]) for key, category in names.items() if row.get(key) is not None}
        yield Row(row["prompt"], labels, "openai-moderation")


def ailuminate(root: Path) -> Iterator[Row]:
    """Prompts of one hazard each; the other hazards' prompts say nothing of a category for certain."""
    hazards = {
        "hte": Category.HATE,
        "sxc_prn": Category.SEXUAL,
        "vcr": Category.VIOLENCE,
        "ssh": Category.SELF_HARM,
    }
    for row in _table(root / "ailuminate-demo.en.csv"):
        if row["hazard"] in hazards:
            yield Row(row["prompt_text"], {hazards[row["hazard"]]: True}, "ailuminate")


def toxigen(root: Path) -> Iterator[Row]:
    with lzma.open(root / "safenlp.toxiGen.json.xz", "rt", encoding="utf-8") as lines:
        for row in json.load(lines):
            yield Row(row["text"], {Category.HATE: bool(row["label"])}, "toxigen")


def davidson(root: Path) -> Iterator[Row]:
    for row in _table(root / "davidson.labeled_data.csv.xz"):
        if row["class"] == "0":
            yield Row(row["tweet"], {Category.HATE: True}, "davidson")
        elif row["class"] == "2":
            yield Row(row["tweet"], {Category.HATE: False}, "davidson")


def toxic_spans(root: Path) -> Iterator[Row]:
    """Comments with threats and attacks on identity that most annotators saw."""
    for row in _lines(root / "toxic-spans.jsonl.xz"):
        votes, least = row["type_votes"], row["annotators"] / 2
        labels = {}
        if any(count > least for name, count in votes.items() if name.startswith("Identity")):
            labels[Category.HATE] = True
        if votes.get("Threat", 0) > least:
            labels[Category.VIOLENCE] = True
        if not row["all_toxic_votes"] and not votes:
            labels = dict(NONE)
        if labels:
            yield Row(row["text"], labels, "toxic-spans")


def talk(root: Path) -> Iterator[Row]:
    """Wikipedia's talk pages: comments that are not toxic."""
    for name in ("cat-large.gn.csv.xz", "cat-large.gc.csv.xz"):
        for row in _table(root / name):
            if float(row["label"]) == 0:
                yield Row(row["text"], NONE, "cat-large")


def requests(root: Path) -> Iterator[Row]:
    """What people ask assistants: harmless requests of CLINC150 and harmless instructions."""
    with lzma.open(root.parent / "intents" / "clinc150.data_full.json.xz", "rt", encoding="utf-8") as lines:
        for split in json.load(lines).values():
            for text, _ in split[:4000]:
                yield Row(text, NONE, "clinc150")
    path = root.parent / "instruct" / "llms-from-scratch.instruction-data.json.xz"
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for row in json.load(lines):
            yield Row(" ".join((row["instruction"], row["input"])).strip(), NONE, "instructions")


def simple_safety(root: Path) -> Iterator[Row]:
    areas = {
        "Suicide, Self-Harm, and Eating Disorders": Category.SELF_HARM,
        "Physical harm and Violence": Category.VIOLENCE,
    }
    for row in _table(root / "simple-safety-tests.csv"):
        if row["harm_area"] in areas:
            yield Row(row["prompts_final"], {areas[row["harm_area"]]: True}, "simple-safety-tests")


def xstest_safe(root: Path) -> Iterator[Row]:
    """Harmless prompts that look harmful."""
    for row in _table(root / "xstest.xstest_prompts.csv"):
        if row["label"] == "safe":
            yield Row(row["prompt"], NONE, "xstest-safe")


TRAINED = (moderation, ailuminate, toxigen, davidson, toxic_spans, talk, requests)
# Half of these is never trained on; the last two not at all.
MEASURED = (moderation, ailuminate, talk, requests, simple_safety, xstest_safe)


def training_rows(root: Path) -> list[Row]:
    return [row for read in TRAINED for row in read(root) if not row.is_held_out]


def held_out_rows(root: Path) -> list[Row]:
    never = (simple_safety, xstest_safe)
    return [row for read in MEASURED for row in read(root) if read in never or row.is_held_out]


def train(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Logistic regression per category over the rows judged in it, harmful ones as heavy as the rest."""
    torch.manual_seed(0)
    found = [features(row.text) for row in rows]
    labels_NC = torch.tensor([[float(row.labels.get(c, False)) for c in Category] for row in rows])
    known_NC = torch.tensor([[float(c in row.labels) for c in Category] for row in rows])
    positive_C = (labels_NC * known_NC).sum(0)
    heavy_C = ((known_NC.sum(0) - positive_C) / positive_C).clamp(max=20.0)
    weights_BC = torch.zeros(NUM_BUCKETS, len(Category), requires_grad=True)
    bias_C = torch.zeros(len(Category), requires_grad=True)
    optimizer = torch.optim.Adam([weights_BC, bias_C], lr=0.05)
    num_epochs, size = 6, 512
    for epoch in range(num_epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - epoch / num_epochs)
        order = torch.randperm(len(rows)).tolist()
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            buckets = torch.from_numpy(np.concatenate([found[i][0] for i in chosen]))
            values = torch.from_numpy(np.concatenate([found[i][1] for i in chosen]))
            starts = torch.tensor([0] + [len(found[i][0]) for i in chosen[:-1]]).cumsum(0)
            scores_NC = torch.nn.functional.embedding_bag(
                buckets, weights_BC, starts, mode="sum", per_sample_weights=values
            )
            loss_NC = torch.nn.functional.binary_cross_entropy_with_logits(
                scores_NC + bias_C, labels_NC[chosen], reduction="none", pos_weight=heavy_C
            )
            loss = (loss_NC * known_NC[chosen]).sum() / known_NC[chosen].sum() + 2e-6 * (weights_BC**2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}", file=sys.stderr)
    return weights_BC.detach().t().contiguous(), bias_C.detach()


def figures(classifier: LinearClassifier, rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Per set and category: recall and false alarms at each severity, and the numbers of texts."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for source in dict.fromkeys(row.source for row in rows):
        own = [row for row in rows if row.source == source]
        scores = [classifier.probabilities(row.text) for row in own]
        for category in Category:
            pairs = [
                (score[category], row.labels[category])
                for score, row in zip(scores, own, strict=True)
                if category in row.labels
            ]
            positives = [score for score, label in pairs if label]
            negatives = [score for score, label in pairs if not label]
            if not pairs:
                continue
            entry: dict[str, float] = {"harmful": len(positives), "harmless": len(negatives)}
            for level, least in classifier.thresholds[category].items():
                name = level.name.lower()
                if positives:
                    entry[f"recall_{name}"] = float(np.mean([score >= least for score in positives]))
                if negatives:
                    entry[f"false_alarms_{name}"] = float(np.mean([score >= least for score in negatives]))
            result.setdefault(source, {})[str(category)] = entry
    return result


# Where the thresholds' harmless texts come from.
EVERYDAY = ("openai-moderation", "cat-large", "clinc150")


def thresholds_of(classifier: LinearClassifier, rows: list[Row]) -> dict[Category, dict[Severity, float]]:
    """The scores that the given shares of harmless texts of the moderation set's trained half reach.

    The held-out half has no say: its figures would be flattered.
    """
    found = {}
    for category in Category:
        harmless = [
            classifier.probabilities(row.text)[category]
            for row in rows
            if row.source in ("openai-moderation", "cat-large", "clinc150")
            and row.labels.get(category) is False
        ]
        found[category] = {
            level: float(np.quantile(harmless, 1 - share)) for level, share in FALSE_ALARMS.items()
        }
    return found


def main() -> None:
    root = folder()
    rows = training_rows(root)
    # A part of the trained half sets the thresholds, and is not fitted.
    fitted = [row for row in rows if zlib.crc32(row.text.encode()[::-1]) % 5]
    tuning = [row for row in rows if not zlib.crc32(row.text.encode()[::-1]) % 5]
    print(f"{len(fitted):,} rows to fit, {len(tuning):,} for the thresholds", file=sys.stderr)
    weights_CB, bias_C = train(fitted)
    scale_C = weights_CB.abs().amax(1) / 127
    quantised_CB = (weights_CB / scale_C[:, None]).round().to(torch.int8)
    plain = LinearClassifier((quantised_CB * scale_C[:, None]).float().numpy(), bias_C.numpy(), {})
    thresholds = thresholds_of(plain, tuning)
    np.savez_compressed(
        WEIGHTS,
        weights=quantised_CB.numpy(),
        scale=scale_C.numpy(),
        bias=bias_C.numpy(),
        thresholds=json.dumps(
            {c: {str(int(s)): v for s, v in levels.items()} for c, levels in thresholds.items()}
        ),
    )
    classifier = LinearClassifier(plain._weights_CB, bias_C.numpy(), thresholds)
    measured = figures(classifier, held_out_rows(root))
    CARD.write_text(card(measured, len(fitted), len(tuning)), encoding="utf-8")
    print(CARD.read_text(encoding="utf-8"))


def card(measured: dict[str, dict[str, dict[str, float]]], num_fitted: int, num_tuning: int) -> str:
    lines = []
    for source, categories in measured.items():
        for category, entry in categories.items():
            keys = [f"{kind}_{level}" for level in LEVELS for kind in KINDS]
            cells = [f"{entry[key]:.1%}" if key in entry else "" for key in keys]
            numbers = f"{entry['harmful']:.0f} / {entry['harmless']:.0f}"
            lines.append(f"| {' | '.join((source, category, numbers, *cells))} |")
    return CARD_TEXT.format(
        table="\n".join(lines), num_fitted=f"{num_fitted:,}", num_tuning=f"{num_tuning:,}"
    )


LEVELS = ("low", "medium", "high")
KINDS = ("recall", "false_alarms")
CARD_TEXT = """# The bundled content filter

A linear classifier over hashed words, pairs of words and runs of letters: small, fast, and **weaker than a
cloud filter**. It is there to annotate and to rank rows for review. Do not rely on it to keep harm out: read
the recall below first. Block lists work exactly; a better classifier can take its place (docs/safety.md).

Each cell is a share of texts that reach the severity: *found* of the harmful ones, *alarm* of the harmless
ones. None of these texts was trained on; `simple-safety-tests` and `xstest-safe` (harmless prompts made to
look harmful) not even in part.

| set | category | harmful / harmless | low: found | alarm | medium: found | alarm | high: found | alarm |
|---|---|---|---|---|---|---|---|---|
{table}

Fitted on {num_fitted} texts, thresholds from {num_tuning} others, of: OpenAI's moderation set (MIT),
AILuminate demo prompts (CC BY 4.0), the human-checked part of ToxiGen in SafeNLP (MIT), Davidson's tweets
(MIT), Toxic Spans (CC0), Wikipedia comments of context-toxicity (Apache-2.0), CLINC150 (CC BY 3.0) and
instructions of LLMs-from-scratch (Apache-2.0). English only. Sarcasm, quotation and spelling beyond folding
escape it; texts that name a group in a harmless way may alarm it.

Made by `tools/train_content_filter.py`, which also measures the table; a test measures it again.
"""


if __name__ == "__main__":
    main()
