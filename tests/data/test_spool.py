"""What lies in temporary files is read as it was written; equal keys are found in however many parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.data import spool
from phinetune.data.spool import RecordSpool, TableSpool, equal_runs


def test_records_come_back_in_any_order_while_more_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_NUM_WAITING", 3)
    monkeypatch.setattr(spool, "_PART_ROWS", 4)
    with RecordSpool([("key", "u8"), ("line", "i4")]) as records:
        for number in range(7):
            records.add(number * 10, -number)
            assert records.at(np.array([number]))["line"].tolist() == [-number]
        records.extend(key=np.array([70, 80], dtype=np.uint64), line=np.array([-7, -8]))
        records.add(90, -9)
        assert len(records) == 10
        assert records.field("key").tolist() == [number * 10 for number in range(10)]
        assert records.at(np.array([9, 0, 9]))["key"].tolist() == [90, 0, 90]


def test_columns_of_a_table_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TableSpool(3)
    blocks = [np.arange(6, dtype=np.uint32).reshape(2, 3), np.arange(30, 45, dtype=np.uint32).reshape(5, 3)]
    for block in blocks:
        table.extend(block)
    for number in range(3):
        assert table.column(number).tolist() == np.concatenate(blocks)[:, number].tolist()
    table.close()


@given(st.lists(st.integers(0, 6) | st.integers(0, 1 << 60)), st.integers(1, 5))
def test_equal_keys_are_found(keys: list[int], part_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "_PART_ROWS", part_rows)
        found = [
            tuple(map(int, run)) for runs in equal_runs(np.array(keys, dtype=np.uint64)) for run in runs.T
        ]
    expected = set()
    for later, key in enumerate(keys):
        before = [number for number in range(later) if keys[number] == key]
        if before:
            expected.add((before[0], before[-1], later))
    assert set(found) == expected
    assert len(found) == len(expected)
