"""Held-out measurements: perplexity on plain English, and copying of words never seen. Knows no optimiser."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from demo_text import records, skills
from demo_text.document import Document, Turn
from demo_text.rendering import NO_LOSS, Renderer
from demo_text.words import WordSource
from numpy.typing import NDArray
from transformers import Phi3ForCausalLM

from demo_train.batches import to_tensors
from demo_train.model import IGNORED, loss_sum

PROBE_SEED = 990_000_001


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Perplexity per token; shares of right tokens or wholly right answers, teacher-forced."""

    perplexity: float
    repeat_tokens: float
    repeat_exact: float
    record_tokens: float
    record_exact: float

    def line(self) -> str:
        """For the log."""
        return (
            f"ppl {self.perplexity:.2f} repeat {self.repeat_tokens:.3f}/{self.repeat_exact:.3f} "
            f"record {self.record_tokens:.3f}/{self.record_exact:.3f}"
        )


def _repeat_documents(count: int) -> list[Document]:
    words = WordSource(rng=random.Random(PROBE_SEED))
    made: list[Document] = []
    for _ in range(count):
        text = ", ".join(words.name().lower() for _ in range(6))
        made.append((Turn("user", f"Repeat after me: {text}", False), Turn("assistant", text)))
    return made


def _record_documents(count: int) -> list[Document]:
    table: dict[skills.Generator, float] = {records.message_to_json: 1.0}
    return list(islice(skills.documents(table, PROBE_SEED, ("kettle", "window", "jacket", "engine")), count))


class Probe:
    """Prepared once, run many times."""

    def __init__(self, renderer: Renderer, held_out: NDArray[np.uint16], num_documents: int = 32) -> None:
        whole = len(held_out) // 513
        self._english = [held_out[i * 513 : (i + 1) * 513] for i in range(0, whole, 3)]
        self._repeat = list(renderer.render(_repeat_documents(num_documents)))
        self._record = list(renderer.render(_record_documents(num_documents)))

    def run(self, model: Phi3ForCausalLM) -> ProbeResult:
        """Measure; leaves the model in training mode."""
        model.eval()
        with torch.no_grad():
            perplexity = self._perplexity(model)
            repeat = self._copying(model, self._repeat)
            record = self._copying(model, self._record)
        model.train()
        return ProbeResult(
            perplexity=perplexity,
            repeat_tokens=repeat[0],
            repeat_exact=repeat[1],
            record_tokens=record[0],
            record_exact=record[1],
        )

    def _perplexity(self, model: Phi3ForCausalLM) -> float:
        total = count = 0.0
        for start in range(0, len(self._english), 8):
            ids, targets = to_tensors(self._english[start : start + 8])
            total += float(loss_sum(model, ids, targets))
            count += float((targets != IGNORED).sum())
        return math.exp(total / max(count, 1))

    @staticmethod
    def _copying(model: Phi3ForCausalLM, documents: list[list[int]]) -> tuple[float, float]:
        right = total = exact = 0
        for start in range(0, len(documents), 16):
            batch = documents[start : start + 16]
            width = max(map(len, batch))
            rows = [np.array(d + [NO_LOSS] * (width - len(d)), dtype=np.uint16) for d in batch]
            ids, targets = to_tensors(rows)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                guesses = model(input_ids=ids, use_cache=False).logits.argmax(-1)
            counted = targets != IGNORED
            hits = (guesses == targets) & counted
            right += int(hits.sum())
            total += int(counted.sum())
            exact += int((hits.sum(1) == counted.sum(1)).sum())
        return right / total, exact / len(documents)
