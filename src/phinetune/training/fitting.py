"""Make rendered examples fit their sequences, losing nothing without being told to.

Plain text longer than a sequence is split into consecutive pieces. A chat is refused, cut or left
out, as the settings say; what happened is returned, never hidden. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phinetune.base.errors import DataError
from phinetune.data.conversation import Conversation, Example
from phinetune.text.render import Rendered

NUM_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Examples that fit, with the indices of the examples they came from and what it took."""

    rendered: list[Rendered]
    indices: list[int]
    num_cut: int
    num_dropped: int
    num_split: int


def fit(
    examples: Sequence[Example], rendered: Sequence[Rendered], seqlen: int, overlong: str, setting: str
) -> Fitted:
    """Fit examples into `seqlen` tokens. `setting` is the name of the limit, for messages.

    Raises `DataError` naming the lines when chats are too long and `overlong` is "error", or when
    cutting would leave a chat without a trained token, and when nothing is left.
    """
    out: list[Rendered] = []
    indices: list[int] = []
    faults: list[tuple[Rendered, int]] = []
    num_cut = num_dropped = num_split = 0
    for index, (example, row) in enumerate(zip(examples, rendered, strict=True)):
        pieces = [row]
        if row.num_tokens > seqlen:
            if not isinstance(example, Conversation):
                num_split += 1
                pieces = _split(row, seqlen)
            elif overlong == "drop":
                num_dropped += 1
                continue
            else:
                kept = Rendered(ids=row.ids[:seqlen], trained=row.trained[:seqlen], source=row.source)
                if overlong == "error" or not kept.num_trained:
                    faults.append((row, row.num_trained - kept.num_trained))
                num_cut += 1
                pieces = [kept]
        out += pieces
        indices += [index] * len(pieces)
    if faults:
        raise _too_long(faults, seqlen, setting)
    if not out:
        raise DataError(
            "no example is left",
            where=setting,
            why=f"all {num_dropped} are longer than {seqlen} tokens and overlong is 'drop'"
            if num_dropped
            else "the data set is empty",
            do=f"write a larger {setting}, or overlong: cut" if num_dropped else "add examples",
        )
    return Fitted(
        rendered=out, indices=indices, num_cut=num_cut, num_dropped=num_dropped, num_split=num_split
    )


def _too_long(faults: Sequence[tuple[Rendered, int]], seqlen: int, setting: str) -> DataError:
    """The refusal: every line while they are few, and what a cut would cost the longest."""
    longest, lost = max(faults, key=lambda fault: fault[0].num_tokens)
    lines = ", ".join(str(row.source.line) for row, _ in faults[:NUM_SHOWN])
    more = f" and {len(faults) - NUM_SHOWN} more" if len(faults) > NUM_SHOWN else ""
    number = "1 example is" if len(faults) == 1 else f"{len(faults)} examples are"
    return DataError(
        f"{number} longer than {seqlen} tokens",
        where=f"{longest.source.file}, line{'s' if len(faults) > 1 else ''} {lines}{more}",
        why=f"the longest, line {longest.source.line}, has {longest.num_tokens} tokens; "
        f"a cut would lose {lost} of its {longest.num_trained} trained tokens",
        do=f"write {setting}: {longest.num_tokens}; or overlong: cut, or overlong: drop; or shorten them",
    )


def _split(row: Rendered, seqlen: int) -> list[Rendered]:
    """Consecutive pieces. Each begins with the last token of the one before, so that no target is lost."""
    pieces = []
    start = 0
    while start < row.num_tokens - 1:
        trained = row.trained[start : start + seqlen].copy()
        trained[0] = False
        pieces.append(Rendered(ids=row.ids[start : start + seqlen], trained=trained, source=row.source))
        start += seqlen - 1
    return pieces
