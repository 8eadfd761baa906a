"""Rows come back from their files as they went in, one at a time, and files that do not fit are refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.base.errors import DataError
from phinetune.data.conversation import Source
from phinetune.text.render import Rendered
from phinetune.text.row_files import (
    ROWS_FILE,
    TOKENS_FILE,
    StoredRows,
    num_tokens_of,
    num_trained_of,
    writing_rows,
)

TOKEN = st.tuples(st.integers(0, 2**31 - 1), st.booleans())
ROWS = st.lists(st.tuples(st.lists(TOKEN, min_size=1, max_size=9), st.booleans()), max_size=8)


def made(tokens, line):
    ids, trained = zip(*tokens, strict=True)
    return Rendered(
        ids=np.array(ids, np.int32), trained=np.array(trained, np.bool_), source=Source(file="a", line=line)
    )


def stored(folder, rows, are_chats=None):
    with writing_rows(folder) as writer:
        writer.add(rows, are_chats=are_chats or [True] * len(rows))
    return StoredRows(folder, file="a")


def some(folder):
    return stored(folder, [made([(5, False), (0, True)], 1), made([(7, False), (8, False), (9, True)], 4)])


@given(ROWS)
def test_rows_come_back_as_they_were(tmp_path_factory, entries):
    rows = [made(tokens, line) for line, (tokens, _) in enumerate(entries, start=3)]
    read = stored(tmp_path_factory.mktemp("rows"), rows, [is_chat for _, is_chat in entries])
    assert len(read) == len(rows)
    for one, other in zip(read, rows, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.ids.dtype == np.int32
        assert one.trained.tolist() == other.trained.tolist()
        assert one.source == other.source
    assert list(num_tokens_of(read)) == num_tokens_of(rows)
    assert list(num_trained_of(read)) == num_trained_of(rows)
    assert read.is_chat.tolist() == [is_chat for _, is_chat in entries]


def test_places_count_from_both_ends_and_in_slices(tmp_path):
    rows = some(tmp_path)
    assert rows[-1].ids.tolist() == rows[1].ids.tolist() == [7, 8, 9]
    assert [row.source.line for row in rows[:]] == [1, 4]
    with pytest.raises(IndexError):
        rows[2]


def test_threads_read_at_once(tmp_path):
    rows = stored(tmp_path, [made([(line, False)] * 50, line) for line in range(1, 200)])
    wrong = []

    def read():
        for _ in range(5):
            wrong.extend(row.source.line for row in rows if set(row.ids.tolist()) != {row.source.line})

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("extra", [b"", b"1234"])
def test_tokens_of_another_size_are_refused(tmp_path, extra):
    some(tmp_path)
    (tmp_path / TOKENS_FILE).write_bytes(b"1234" * 4 + 2 * extra)
    with pytest.raises(ValueError, match="bytes for 5 tokens"):
        StoredRows(tmp_path, file="a")


def test_another_table_is_refused(tmp_path):
    some(tmp_path)
    np.save(tmp_path / ROWS_FILE, np.arange(3))
    with pytest.raises(ValueError, match="no table of rows"):
        StoredRows(tmp_path, file="a")


def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_crash(tmp_path):
    rows = some(tmp_path)
    (tmp_path / TOKENS_FILE).write_bytes(b"1234")
    with pytest.raises(DataError, match="cut short"):
        rows[1]
