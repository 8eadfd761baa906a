"""Derive every random choice of a run from one seed, so that none has to be stored.

Knows nothing of what the numbers are used for.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, for example `derive(42, "order", epoch)`.

    A pure function: an interrupted run that asks again gets the same number.

    >>> derive(42, "order", 0) == derive(42, "order", 0) != derive(42, "order", 1)
    True
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
