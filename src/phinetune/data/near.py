"""Pairs of texts that are nearly alike, among a million, by MinHash and locality-sensitive hashing.

A text is the set of its runs of five characters. Two texts are alike when what they share is at least 0.8 of
what they hold together (Jaccard). Few pairs are ever compared: those whose minimum hashes agree in one of 16
bands, of which a pair at 0.8 is missed twice in a thousand. Texts and signatures wait in temporary files.
Knows nothing of rows or rules.

# R rows, S shingles of a batch, K hashes, B bands
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phinetune.data.groups import Groups
from phinetune.data.spool import RecordSpool, TableSpool, equal_runs

SHINGLE_CHARS = 5
THRESHOLD = 0.8
NUM_HASHES = 80
_BANDS, _PROMPT_BANDS = 16, 10
_BATCH_CHARS, _BATCH_TEXTS = 1 << 17, 4096
_PAIRS_AT_ONCE = 50_000
# The estimate from 80 hashes has a standard deviation of 0.045 at 0.8: outside three of them it decides.
_SURELY, _HARDLY = 0.94, 0.66
MAX_COMPARED = 300_000

_U32, _U64 = np.uint32, np.uint64
_RANDOM = np.random.default_rng(0x5EED)
_FACTORS_K = _RANDOM.integers(1, 1 << 32, NUM_HASHES, dtype=np.uint64).astype(_U32) | _U32(1)
_ADDENDS_K = _RANDOM.integers(0, 1 << 32, NUM_HASHES, dtype=np.uint64).astype(_U32)
_PLACES = [_U64(value) for value in _RANDOM.integers(1 << 32, 1 << 63, SHINGLE_CHARS, dtype=np.uint64)]

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


class NearIndex:
    """Texts of two parts, a prompt and an answer, to be paired with those nearly alike.

    A guard is a number of 32 bits that two texts must share to be paired at all. Texts and signatures lie in
    temporary files; memory hardly grows with their number.
    """

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._waiting_guards: list[tuple[int, int]] = []
        self._num_waiting_chars = 0
        self._bands, self._prompt_bands = TableSpool(_BANDS), TableSpool(_PROMPT_BANDS)
        self._signs = RecordSpool([("guard", "u4"), ("low_bits", "u1", (NUM_HASHES,))])
        self._texts = tempfile.TemporaryFile(prefix="phinetune-")  # noqa: SIM115 (closed by `close`)
        self._places = RecordSpool([("start", "u8"), ("size", "u4"), ("is_prompt_alone", "?")])
        self._end = 0

    def __len__(self) -> int:
        return len(self._places)

    def add(
        self,
        prompt: str,
        answer: str,
        *,
        guard: int = 0,
        prompt_guard: int = 0,
        is_prompt_alone: bool = False,
    ) -> int:
        """Take a text in; returns its number, counted from 0.

        With `is_prompt_alone` the answer is kept but not compared: a label would make short prompts alike.
        """
        written = f"{prompt}\0{answer}".encode("utf-8", "surrogatepass")
        self._texts.write(written)
        self._places.add(self._end, len(written), is_prompt_alone)
        self._end += len(written)
        self._waiting += [prompt, "" if is_prompt_alone else answer]
        self._waiting_guards.append((guard, prompt_guard))
        self._num_waiting_chars += len(prompt) + len(answer)
        if self._num_waiting_chars > _BATCH_CHARS or len(self._waiting_guards) >= _BATCH_TEXTS:
            self._hash()
        return len(self) - 1

    def text(self, number: int) -> tuple[str, str]:
        """Prompt and answer of a text that was taken in."""
        return self._text(self._places.at(np.array([number]))[0])

    def _compared(self, number: int) -> tuple[str, str]:
        place = self._places.at(np.array([number]))[0]
        prompt, answer = self._text(place)
        return prompt, "" if place["is_prompt_alone"] else answer

    def _text(self, place: Any) -> tuple[str, str]:
        self._texts.seek(int(place["start"]))
        written = self._texts.read(int(place["size"]))
        self._texts.seek(0, 2)
        prompt, _, answer = written.decode("utf-8", "surrogatepass").partition("\0")
        return prompt, answer

    def close(self) -> None:
        """Let the temporary files go."""
        for file in (self._texts, self._places, self._signs, self._bands, self._prompt_bands):
            file.close()

    def __enter__(self) -> NearIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pairs(self, is_alive_R: NDArray[np.bool_] | None = None) -> Iterator[tuple[int, int]]:
        """Pairs (earlier, later) that are alike: as many as connect every group, no more.

        `is_alive_R` leaves texts out. Beyond `MAX_COMPARED` doubtful pairs the estimate decides, right within
        0.1 of the threshold.
        """
        self._hash()
        shingles = lru_cache(maxsize=2048)(lambda number: _shingle_set(*self._compared(number)))
        groups, num_compared = Groups(len(self)), 0
        for ones, others in _candidates(self._bands, _BANDS, is_alive_R):
            is_open = [
                groups.first(one) != groups.first(other)
                for one, other in zip(ones.tolist(), others.tolist(), strict=True)
            ]
            ones, others = ones[is_open], others[is_open]
            likeness = self._estimated(ones, others)
            for index in np.nonzero(likeness >= _HARDLY)[0]:
                one, other, about = int(ones[index]), int(others[index]), float(likeness[index])
                if groups.first(one) == groups.first(other):
                    continue
                if about < _SURELY and num_compared < MAX_COMPARED:
                    num_compared += 1
                    about = jaccard(shingles(one), shingles(other))
                if about >= THRESHOLD:
                    groups.join(one, other)
                    yield one, other

    def prompt_pairs(self) -> Iterator[tuple[int, int]]:
        """Pairs whose prompts may agree in most of their runs of characters; about `MAX_COMPARED` at most."""
        self._hash()
        num_given = 0
        for ones, others in _candidates(self._prompt_bands, _PROMPT_BANDS):
            yield from zip(ones.tolist(), others.tolist(), strict=True)
            num_given += len(ones)
            if num_given > MAX_COMPARED:
                return

    def _hash(self) -> None:
        if not self._waiting:
            return
        guards_R2 = np.array(self._waiting_guards, dtype=_U64)
        hashes_2RK = _minimum_hashes(self._waiting)
        self._waiting, self._waiting_guards, self._num_waiting_chars = [], [], 0
        prompts_RK = hashes_2RK[0::2]
        whole_RK = np.minimum(prompts_RK, hashes_2RK[1::2])
        self._bands.extend(_guarded(_band_keys(whole_RK, _BANDS), guards_R2[:, 0]))
        self._prompt_bands.extend(_guarded(_band_keys(prompts_RK, _PROMPT_BANDS), guards_R2[:, 1]))
        low_bits_RK = ((whole_RK >> _U32(8)) & _U32(0xFF)).astype(np.uint8)
        self._signs.extend(guard=guards_R2[:, 0], low_bits=low_bits_RK)

    def _estimated(self, ones: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
        """Jaccard from the share of equal hashes, of which eight bits are kept: one in 256 agrees by chance.

        0 where the guards differ: keys of 32 bits may agree by chance.
        """
        if not len(ones):
            return np.empty(0)
        signs = self._signs.at(np.concatenate([ones, others]))
        one, other = signs[: len(ones)], signs[len(ones) :]
        share = (one["low_bits"] == other["low_bits"]).mean(axis=1)
        return np.where(one["guard"] == other["guard"], (share - 1 / 256) / (1 - 1 / 256), 0.0)


def _shingle_hashes(codes: NDArray[Any]) -> NDArray[Any]:
    """A well-mixed hash of every run of five code points, (S,) in 32 bits."""
    mixed = np.zeros(max(len(codes) - SHINGLE_CHARS + 1, 0), dtype=_U64)
    for place, factor in enumerate(_PLACES):
        mixed += codes[place : place + len(mixed)].astype(_U64) * factor
    mixed ^= mixed >> _U64(31)
    mixed *= _U64(0x9E3779B97F4A7C15)
    return (mixed >> _U64(32)).astype(_U32)


def _minimum_hashes(texts: list[str]) -> NDArray[Any]:
    """The least of each hash function over the shingles of each text, (texts, K)."""
    padded = [text.ljust(SHINGLE_CHARS) for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = np.array([len(text) for text in padded])
    ends = np.cumsum(lengths)
    # Runs that begin in one text and end in the next are none.
    is_whole = np.ones(len(codes), dtype=bool)
    for back in range(1, SHINGLE_CHARS):
        is_whole[ends - back] = False
    hashes_S = _shingle_hashes(codes)[is_whole[: len(codes) - SHINGLE_CHARS + 1]]
    counts = lengths - SHINGLE_CHARS + 1
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    least = np.empty((NUM_HASHES, len(texts)), dtype=_U32)
    buffer_S = np.empty_like(hashes_S)
    for index in range(NUM_HASHES):
        np.multiply(hashes_S, _FACTORS_K[index], out=buffer_S)
        buffer_S += _ADDENDS_K[index]
        np.minimum.reduceat(buffer_S, starts, out=least[index])
    least[:, [not text for text in texts]] = np.iinfo(_U32).max
    return np.ascontiguousarray(least.T)


def _band_keys(hashes_RK: NDArray[Any], num_bands: int) -> NDArray[Any]:
    """One number for each band of hashes, (R, B)."""
    size = NUM_HASHES // num_bands
    keys_RB = np.zeros((len(hashes_RK), num_bands), dtype=_U64)
    for place in range(size):
        keys_RB = (keys_RB ^ hashes_RK[:, place::size]) * _U64(0x9E3779B97F4A7C15)
        keys_RB ^= keys_RB >> _U64(29)
    return (keys_RB >> _U64(16)).astype(_U32)


def _guarded(keys_RB: NDArray[Any], guards_R: NDArray[Any]) -> NDArray[np.uint32]:
    """Keys that differ where the guards do, but for one in 2 ** 32."""
    mixed = (keys_RB.astype(_U64) ^ (guards_R[:, None] * _U64(0xC2B2AE3D27D4EB4F))) * _U64(0x9E3779B97F4A7C15)
    return (mixed >> _U64(32)).astype(_U32)


def _candidates(
    table: TableSpool, num_bands: int, is_alive_R: NDArray[np.bool_] | None = None
) -> Iterator[Pairs]:
    """Pairs of one key, band by band: each row with the one before and with the first of its key."""
    for band in range(num_bands):
        for firsts, before, later in equal_runs(table.column(band), is_alive_R):
            again = firsts != before
            ones, others = np.concatenate([firsts, before[again]]), np.concatenate([later, later[again]])
            for start in range(0, len(ones), _PAIRS_AT_ONCE):
                yield ones[start : start + _PAIRS_AT_ONCE], others[start : start + _PAIRS_AT_ONCE]


def _shingle_set(prompt: str, answer: str) -> NDArray[Any]:
    parts = [
        _shingle_hashes(
            np.frombuffer(text.ljust(SHINGLE_CHARS).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        )
        for text in (prompt, answer)
        if text
    ]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=_U32)


def jaccard(one: NDArray[Any], other: NDArray[Any]) -> float:
    """What two sets of hashes share, of what they hold together."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(len(one) + len(other) - shared, 1)


def likeness(one: tuple[str, str], other: tuple[str, str]) -> float:
    """Jaccard of two (prompt, answer), exactly.

    >>> likeness(("", "the same text"), ("", "the same text"))
    1.0
    """
    return jaccard(_shingle_set(*one), _shingle_set(*other))
