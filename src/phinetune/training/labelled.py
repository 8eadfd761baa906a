"""Make rows with classes fit their sequences: a text is never split, its class belongs to the whole.

Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phinetune.base.errors import DataError
from phinetune.text.labelled import Labelled
from phinetune.training.fitting import NUM_SHOWN, Fitted, nothing_left


def fit_labelled(rows: Sequence[Labelled], seqlen: int, overlong: str, setting: str) -> Fitted:
    """Refuse, cut or drop rows of more than `seqlen` tokens; a cut row tells its class at its last token.

    Raises `DataError` naming the lines when `overlong` is "error", and when nothing is left.
    """
    kept: list[tuple[int, Labelled]] = []
    faults: list[Labelled] = []
    num_cut = num_dropped = 0
    for index, row in enumerate(rows):
        if row.num_tokens <= seqlen:
            kept.append((index, row))
        elif overlong == "drop":
            num_dropped += 1
        elif overlong == "cut":
            num_cut += 1
            kept.append((index, replace(row, ids=row.ids[:seqlen], trained=row.trained[-seqlen:])))
        else:
            faults.append(row)
    if faults:
        longest = max(row.num_tokens for row in faults)
        lines = ", ".join(str(row.source) for row in faults[:NUM_SHOWN])
        raise DataError(
            f"{len(faults):,} rows are longer than {seqlen} tokens",
            where=lines + (" …" if len(faults) > NUM_SHOWN else ""),
            why=f"the longest has {longest} tokens",
            do=f"write {setting}: {longest}; or overlong: cut, or overlong: drop; or shorten them",
        )
    if not kept:
        raise nothing_left(num_dropped, seqlen, setting)
    return Fitted(
        rendered=[row for _, row in kept],
        indices=[index for index, _ in kept],
        num_cut=num_cut,
        num_dropped=num_dropped,
        num_split=0,
    )
