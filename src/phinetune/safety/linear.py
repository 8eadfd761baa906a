"""The bundled classifier: hashed words and letters, one logistic regression per category.

Weak beside a cloud filter and honest about it: what it finds and misses is measured on texts it never saw
and stands in `content_filter.md` beside its weights. Made by tools/train_content_filter.py.

# F features of one text, C categories
"""

from __future__ import annotations

import functools
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phinetune.base.errors import ModelError
from phinetune.safety.categories import Category, Severity
from phinetune.safety.folding import fold

NUM_BUCKETS = 1 << 16
WEIGHTS = Path(__file__).parent / "content_filter.npz"
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def features(text: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Buckets and weights of a text, (F,) each: words, pairs of words, runs of 3 and 4 letters.

    A feature seen n times counts 1 + ln n; the weights together have length 1.
    """
    counts: dict[int, int] = {}
    for surface in _surfaces(fold(text)):
        bucket = zlib.crc32(surface.encode()) % NUM_BUCKETS
        counts[bucket] = counts.get(bucket, 0) + 1
    buckets_F = np.fromiter(counts, dtype=np.int64, count=len(counts))
    weights_F = 1 + np.log(np.fromiter(counts.values(), dtype=np.float32, count=len(counts)))
    return buckets_F, (weights_F / max(float(np.linalg.norm(weights_F)), 1e-9)).astype(np.float32)


def _surfaces(text: str) -> Iterator[str]:
    words = _WORD.findall(text)
    previous = ""
    for word in words:
        yield f"w {word}"
        if previous:
            yield f"p {previous} {word}"
        previous = word
        padded = f"<{word}>"
        for size in (3, 4):
            for start in range(len(padded) - size + 1):
                yield f"c {padded[start : start + size]}"


class LinearClassifier:
    """Severities by thresholds on each category's probability."""

    def __init__(
        self,
        weights_CB: NDArray[np.float32],
        bias_C: NDArray[np.float32],
        thresholds: Mapping[Category, Mapping[Severity, float]],
    ) -> None:
        self._weights_CB, self._bias_C, self.thresholds = weights_CB, bias_C, thresholds

    def probabilities(self, text: str) -> dict[Category, float]:
        """How likely a text belongs to each category."""
        buckets_F, weights_F = features(text)
        scores_C = self._weights_CB[:, buckets_F] @ weights_F + self._bias_C
        return dict(zip(Category, (1 / (1 + np.exp(-scores_C))).tolist(), strict=True))

    def severities(self, text: str) -> dict[Category, Severity]:
        """The gravest severity whose threshold each category reaches."""
        found = {}
        for category, probability in self.probabilities(text).items():
            reached = [level for level, least in self.thresholds[category].items() if probability >= least]
            found[category] = max(reached, default=Severity.SAFE)
        return found


@functools.cache
def bundled() -> LinearClassifier:
    """The classifier that ships with the package."""
    if not WEIGHTS.is_file():
        raise ModelError("the content filter's weights are missing", where=str(WEIGHTS), do="install again")
    with np.load(WEIGHTS, allow_pickle=False) as content:
        quantised_CB, scale_C, bias_C = content["weights"], content["scale"], content["bias"]
        thresholds = json.loads(str(content["thresholds"]))
    return LinearClassifier(
        quantised_CB.astype(np.float32) * scale_C[:, None],
        bias_C,
        {
            Category(name): {Severity(int(level)): least for level, least in levels.items()}
            for name, levels in thresholds.items()
        },
    )
