"""Pairs of texts that are nearly alike, among a million, by MinHash and locality-sensitive hashing.

A text is the set of its runs of five characters. Two texts are alike when what they share is at least 0.8 of
what they hold together (Jaccard). Few pairs are ever compared: those whose minimum hashes agree in one of 16
bands, of which a pair at 0.8 is missed twice in a thousand. Texts themselves wait in a temporary file.
Knows nothing of rows or rules.

# R rows, S shingles of a batch, K hashes, B bands
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phinetune.data.groups import Groups

SHINGLE_CHARS = 5
THRESHOLD = 0.8
NUM_HASHES = 80
_BANDS, _PROMPT_BANDS = 16, 10
_BATCH_CHARS = 1 << 17
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

    A guard is a number that two texts must share to be paired at all.
    """

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._num_waiting_chars = 0
        self._whole: list[NDArray[Any]] = []
        self._prompts: list[NDArray[Any]] = []
        self._low_bits: list[NDArray[Any]] = []
        self._guards, self._prompt_guards = array("Q"), array("Q")
        self._spool = tempfile.TemporaryFile(prefix="phinetune-")  # noqa: SIM115 (closed by `close`)
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self._guards)

    def add(self, prompt: str, answer: str, *, guard: int = 0, prompt_guard: int = 0) -> int:
        """Take a text in; returns its number, counted from 0."""
        self._guards.append(guard)
        self._prompt_guards.append(prompt_guard)
        written = f"{prompt}\0{answer}".encode("utf-8", "surrogatepass")
        self._spool.write(written)
        self._ends.append(self._ends[-1] + len(written))
        self._waiting += [prompt, answer]
        self._num_waiting_chars += len(prompt) + len(answer)
        if self._num_waiting_chars > _BATCH_CHARS:
            self._hash()
        return len(self._guards) - 1

    def text(self, number: int) -> tuple[str, str]:
        """Prompt and answer of a text that was taken in."""
        self._spool.seek(self._ends[number])
        written = self._spool.read(self._ends[number + 1] - self._ends[number])
        self._spool.seek(0, 2)
        prompt, _, answer = written.decode("utf-8", "surrogatepass").partition("\0")
        return prompt, answer

    def close(self) -> None:
        """Let the temporary file go."""
        self._spool.close()

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
        numbers_R = np.arange(len(self)) if is_alive_R is None else np.nonzero(is_alive_R)[0]
        if len(numbers_R) < 2:
            return
        low_bits_RK = np.concatenate(self._low_bits)
        guards_R = np.frombuffer(self._guards, dtype=_U64)
        shingles = lru_cache(maxsize=4096)(lambda number: _shingle_set(*self.text(number)))
        groups, num_compared = Groups(len(self)), 0
        for places, other_places in _candidates(np.concatenate(self._whole)[numbers_R], guards_R[numbers_R]):
            ones, others = numbers_R[places], numbers_R[other_places]
            likeness = _estimated(low_bits_RK, ones, others)
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
        if len(self) > 1:
            guards_R = np.frombuffer(self._prompt_guards, dtype=_U64)
            num_given = 0
            for ones, others in _candidates(np.concatenate(self._prompts), guards_R):
                yield from zip(ones.tolist(), others.tolist(), strict=True)
                num_given += len(ones)
                if num_given > MAX_COMPARED:
                    return

    def _hash(self) -> None:
        if not self._waiting:
            return
        hashes_2RK = _minimum_hashes(self._waiting)
        self._waiting, self._num_waiting_chars = [], 0
        prompts_RK = hashes_2RK[0::2]
        whole_RK = np.minimum(prompts_RK, hashes_2RK[1::2])
        self._whole.append(_band_keys(whole_RK, _BANDS))
        self._prompts.append(_band_keys(prompts_RK, _PROMPT_BANDS))
        self._low_bits.append(((whole_RK >> _U32(8)) & _U32(0xFF)).astype(np.uint8))


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


def _candidates(keys_RB: NDArray[Any], guards_R: NDArray[Any]) -> Iterator[Pairs]:
    """Pairs of one key and guard, band by band: each row with its neighbour and with the first of its key."""
    num_rows = len(keys_RB)
    for band in range(keys_RB.shape[1]):
        keys_R = keys_RB[:, band].astype(_U64) ^ (guards_R * _U64(0x9E3779B97F4A7C15))
        order = np.argsort(keys_R, kind="stable")
        is_new = np.concatenate([[True], keys_R[order][1:] != keys_R[order][:-1]])
        firsts = order[np.maximum.accumulate(np.where(is_new, np.arange(num_rows), 0))]
        later = np.nonzero(~is_new)[0]
        ones = np.concatenate([firsts[later], order[later - 1]])
        others = np.concatenate([order[later], order[later]])
        codes = np.unique(ones.astype(np.int64) * num_rows + others)
        codes = codes[guards_R[codes // num_rows] == guards_R[codes % num_rows]]
        for start in range(0, len(codes), 100_000):
            part = codes[start : start + 100_000]
            yield part // num_rows, part % num_rows


def _estimated(low_bits_RK: NDArray[Any], ones: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    """Jaccard from the share of equal hashes, of which eight bits are kept: one in 256 agrees by chance."""
    share = (low_bits_RK[ones] == low_bits_RK[others]).mean(axis=1)
    return np.asarray((share - 1 / 256) / (1 - 1 / 256))


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
