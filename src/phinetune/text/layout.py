"""From pieces to token ids and the mask of trained tokens, in one pass for many chats.

Text between two control tokens is encoded as one run, the way transformers does it, but by the plain
tokenizer. Knows nothing of messages or templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phinetune.text.pieces import Piece, Text
from phinetune.text.tokenizer import WHITE_SPACE, ControlToken, EncodedText, TextTokenizer

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Run:
    """Text between two control tokens; `trained` is one bool per character, or one for all."""

    text: str
    trained: bool | tuple[bool, ...]
    is_start: bool


_Part = tuple[ControlToken, bool] | _Run


def lay_out(tokenizer: TextTokenizer, chats: Sequence[Sequence[Piece]]) -> list[tuple[Ids, Mask]]:
    """Each chat's ids int32 [T] and trained bool [T]; the first token is never trained.

    Raises DataError for text that cannot be encoded.
    """
    parts = [_parts(tokenizer, chat) for chat in chats]
    encoded = _encode(tokenizer, [part for chat in parts for part in chat if isinstance(part, _Run)])
    return [_join(chat, encoded) for chat in parts]


def _parts(tokenizer: TextTokenizer, pieces: Sequence[Piece]) -> list[_Part]:
    """Control tokens, and between them the text with the white space gone that the tokens take away."""
    parts: list[_Part] = []
    texts: list[Text] = []
    last: ControlToken | None = None
    for piece in pieces:
        if isinstance(piece, Text):
            texts.append(piece)
            continue
        control = tokenizer.controls[piece.surface]
        parts += _run(texts, last, control, is_start=last is None)
        parts.append((control, piece.trained))
        texts, last = [], control
    return parts + _run(texts, last, None, is_start=last is None)


def _run(
    texts: Sequence[Text], before: ControlToken | None, after: ControlToken | None, *, is_start: bool
) -> list[_Part]:
    whole = "".join(piece.text for piece in texts)
    begin, end = 0, len(whole)
    if before is not None and before.strips_right:
        begin = end - len(whole.lstrip(WHITE_SPACE))
    if after is not None and after.strips_left:
        end = len(whole.rstrip(WHITE_SPACE))
    if begin >= end:
        return []
    return [_Run(whole[begin:end], _flags(texts, begin, end), is_start)]


def _flags(texts: Sequence[Text], begin: int, end: int) -> bool | tuple[bool, ...]:
    """Whether the characters `begin` to `end` of the joined texts are trained: one bool if all are alike."""
    lengths: list[tuple[bool, int]] = []
    position = 0
    for piece in texts:
        length = min(end, position + len(piece.text)) - max(begin, position)
        position += len(piece.text)
        if length > 0:
            lengths.append((piece.trained, length))
    if len({trained for trained, _ in lengths}) == 1:
        return lengths[0][0]
    return tuple(trained for trained, length in lengths for _ in range(length))


def _encode(tokenizer: TextTokenizer, runs: Sequence[_Run]) -> dict[tuple[str, bool, bool], EncodedText]:
    """Every different text once, in at most four batches."""
    keys = list(dict.fromkeys(_key(run) for run in runs))
    encoded: dict[tuple[str, bool, bool], EncodedText] = {}
    for is_start in (True, False):
        for with_positions in (True, False):
            batch = [key for key in keys if key[1:] == (is_start, with_positions)]
            texts = [key[0] for key in batch]
            results = tokenizer.encode_many(texts, is_start=is_start, with_positions=with_positions)
            encoded.update(zip(batch, results, strict=True))
    return encoded


def _key(run: _Run) -> tuple[str, bool, bool]:
    return run.text, run.is_start, isinstance(run.trained, tuple)


def _join(parts: Sequence[_Part], encoded: dict[tuple[str, bool, bool], EncodedText]) -> tuple[Ids, Mask]:
    ids: list[int] = []
    trained: list[bool] = []
    for part in parts:
        if isinstance(part, tuple):
            ids.append(part[0].id)
            trained.append(part[1])
            continue
        result = encoded[_key(part)]
        ids += result.ids
        if isinstance(part.trained, tuple):
            # A token is trained when the last character that it stands for is.
            trained += [part.trained[position] for position in result.positions]
        else:
            trained += [part.trained] * len(result.ids)
    if trained:
        trained[0] = False  # nothing stands before it from which it could be predicted
    return np.array(ids, dtype=np.int32), np.array(trained, dtype=np.bool_)
