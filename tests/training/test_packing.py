"""Packing is a pure function that loses nothing and never overfills a sequence."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.training.packing import (
    Sampling,
    batches,
    epoch_sequences,
    order,
    pack,
    packed,
    sample,
)

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def sampling(seqlen=40, max_sequences=1000, is_packed=True, seed=42):
    return Sampling(seqlen=seqlen, max_sequences=max_sequences, is_packed=is_packed, seed=seed)


def flat(sequences):
    return [row for sequence in sequences for row in sequence]


@given(st.integers(0, 200), st.integers(0, 2**31 - 1), st.integers(0, 20))
def test_an_order_is_a_permutation_and_a_pure_function(num_rows, seed, epoch):
    rows = order(num_rows, seed=seed, epoch=epoch)
    assert sorted(rows) == list(range(num_rows))
    assert rows == order(num_rows, seed=seed, epoch=epoch)


def test_seed_and_epoch_change_the_order():
    assert len({tuple(order(50, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}) == 16


@given(LENGTHS, st.integers(40, 100))
def test_packing_keeps_every_row_once_in_order_and_never_overfills(lengths, seqlen):
    sequences = list(pack(range(len(lengths)), lengths, seqlen))
    assert flat(sequences) == list(range(len(lengths)))
    filled = [sum(lengths[row] for row in sequence) for sequence in sequences]
    assert max(filled) <= seqlen
    assert all(a + lengths[b[0]] > seqlen for a, b in zip(filled, sequences[1:], strict=False)), (
        "room was left"
    )


@given(LENGTHS, st.integers(1, 30), st.booleans(), st.integers(0, 100))
def test_a_sample_never_takes_more_sequences_than_asked(lengths, limit, is_packed, seed):
    wanted = sampling(max_sequences=limit, is_packed=is_packed, seed=seed)
    rows = sample(lengths, wanted)
    first = packed(rows, lengths, wanted)
    assert len(first) <= limit
    assert sorted(flat(first)) == sorted(rows)
    assert len(set(rows)) == len(rows) >= 1
    in_order = sample(lengths, wanted, in_file_order=True)
    assert in_order == sorted(in_order)
    assert set(in_order) <= set(rows)
    assert 1 <= len(packed(in_order, lengths, wanted)) <= limit
    if limit >= len(lengths):
        assert sorted(rows) == in_order == list(range(len(lengths)))


@given(LENGTHS, st.booleans(), st.integers(0, 30))
def test_every_epoch_sees_every_sampled_row_once(lengths, is_packed, epoch):
    wanted = sampling(is_packed=is_packed)
    rows = sample(lengths, wanted)
    once = packed(rows, lengths, wanted)
    sequences = epoch_sequences(once, seed=3, epoch=epoch)
    assert sorted(flat(sequences)) == sorted(rows) == sorted(sequences.rows)
    assert sorted(sequences) == sorted(once)
    assert sequences == epoch_sequences(once, seed=3, epoch=epoch)
    assert is_packed or all(len(sequence) == 1 for sequence in sequences)


def test_epochs_differ_and_so_do_seeds():
    lengths = [1] * 40
    rows = sample(lengths, sampling(is_packed=False))
    once = packed(rows, lengths, sampling(is_packed=False))
    epochs = [flat(epoch_sequences(once, seed=42, epoch=epoch)) for epoch in range(4)]
    assert all(a != b for a, b in pairwise(epochs))
    assert sample(lengths, sampling(seed=1)) != sample(lengths, sampling(seed=2))


def test_the_seed_decides_which_rows_are_sampled():
    lengths = [40] * 50
    chosen = {tuple(sorted(sample(lengths, sampling(max_sequences=5, seed=seed)))) for seed in range(5)}
    assert len(chosen) == 5
    assert all(len(rows) == 5 for rows in chosen)


@given(st.integers(0, 50), st.integers(1, 9))
def test_batches_keep_every_sequence_in_order(num, size):
    sequences = [(row,) for row in range(num)]
    groups = list(batches(sequences, size))
    assert [sequence for group in groups for sequence in group] == sequences
    assert all(len(group) == size for group in groups[:-1])
    assert all(1 <= len(group) <= size for group in groups)


def test_a_row_longer_than_a_sequence_stands_alone():
    assert list(pack([0, 1, 2], [3, 90, 3], seqlen=10)) == [(0,), (1,), (2,)]


@pytest.mark.parametrize(("is_packed", "expected"), [(True, 2), (False, 8)])
def test_one_example_per_sequence_when_lengths_vary(is_packed, expected):
    wanted = sampling(is_packed=is_packed)
    assert len(packed(range(8), [10] * 8, wanted)) == expected
