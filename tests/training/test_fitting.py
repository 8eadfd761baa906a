"""Long rows are split, cut, left out or refused, and each of it is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.base.errors import DataError
from phinetune.data.conversation import Conversation, Message, PlainText, Source
from phinetune.text.render import Rendered
from phinetune.training.fitting import fit


def chat(line):
    message = Message(role="user", content="x")
    return Conversation(messages=(message,), source=Source(file="train.json", line=line))


def text(line):
    return PlainText(text="x", source=Source(file="train.txt", line=line))


def rendered(example, length, trained_from=1):
    trained = np.arange(length) >= max(1, trained_from)
    return Rendered(ids=np.arange(length, dtype=np.int32) + 1000, trained=trained, source=example.source)


def fitted(examples, lengths, overlong, seqlen=10, trained_from=1):
    rows = [rendered(e, n, trained_from) for e, n in zip(examples, lengths, strict=True)]
    are_chats = [isinstance(example, Conversation) for example in examples]
    return rows, fit(rows, are_chats, seqlen, overlong, "finetune_train_seqlen")


CHATS = [chat(1), chat(2), chat(3)]


@pytest.mark.parametrize("overlong", ["error", "cut", "drop"])
def test_rows_that_fit_stay_as_they_are(overlong):
    rows, result = fitted(CHATS, [3, 10, 7], overlong)
    assert result.rendered == rows
    assert list(result.indices) == [0, 1, 2]
    assert (result.num_cut, result.num_dropped, result.num_split) == (0, 0, 0)


def test_long_chats_are_refused_by_line_with_the_length_that_would_do():
    with pytest.raises(DataError, match="2 examples are longer than 10 tokens") as caught:
        fitted(CHATS, [11, 10, 25], "error")
    error = caught.value
    assert error.where == "train.json, lines 1, 3"
    assert error.why == "the longest, line 3, has 25 tokens; a cut would lose 15 of its 24 trained tokens"
    assert "finetune_train_seqlen: 25" in error.do


def test_the_list_of_refused_lines_is_short_and_counted():
    with pytest.raises(DataError, match="50 examples") as caught:
        fitted([chat(line) for line in range(1, 51)], [11] * 50, "error")
    assert "and 30 more" in caught.value.where
    assert caught.value.where.count(",") == 20


def test_cutting_keeps_the_beginning_and_counts():
    rows, result = fitted(CHATS, [11, 10, 25], "cut")
    assert [row.num_tokens for row in result.rendered] == [10, 10, 10]
    assert result.rendered[2].ids.tolist() == rows[2].ids[:10].tolist()
    assert result.rendered[2].trained.tolist() == rows[2].trained[:10].tolist()
    assert (result.num_cut, result.num_dropped) == (2, 0)


def test_a_cut_that_would_leave_nothing_to_train_is_refused():
    _, result = fitted(CHATS, [10, 10, 25], "cut", trained_from=9)
    assert [row.num_trained for row in result.rendered] == [1, 1, 1]
    with pytest.raises(DataError, match="1 example is longer") as caught:
        fitted(CHATS, [10, 10, 25], "cut", trained_from=10)
    assert caught.value.where == "train.json, line 3"


def test_dropping_leaves_out_and_counts():
    _, result = fitted(CHATS, [11, 10, 25], "drop")
    assert list(result.indices) == [1]
    assert (result.num_cut, result.num_dropped) == (0, 2)


def test_dropping_everything_is_refused():
    with pytest.raises(DataError, match="no example is left") as caught:
        fitted(CHATS, [11, 12, 25], "drop")
    assert "all 3 are longer than 10 tokens" in caught.value.why


@given(st.integers(2, 200), st.integers(8, 60), st.sampled_from(["error", "cut", "drop"]))
def test_split_text_keeps_every_target_exactly_once_after_the_same_token(length, seqlen, overlong):
    example = text(7)
    _, result = fitted([example], [length], overlong, seqlen)
    seen = []
    for piece in result.rendered:
        assert 2 <= piece.num_tokens <= seqlen
        assert not piece.trained[0]
        places = np.flatnonzero(piece.trained)
        seen += [(int(piece.ids[t - 1]), int(piece.ids[t])) for t in places]
        assert piece.source == example.source
    assert seen == [(1000 + t - 1, 1000 + t) for t in range(1, length)]
    assert list(result.indices) == [0] * len(result.rendered)
    assert result.num_split == (length > seqlen)
    assert (result.num_cut, result.num_dropped) == (0, 0)


def test_a_mixed_set_keeps_the_place_of_every_example():
    examples = [chat(1), text(2), chat(3), text(4)]
    _, result = fitted(examples, [30, 25, 5, 5], "drop")
    assert list(result.indices) == [1, 1, 1, 2, 3]
    assert (result.num_split, result.num_dropped) == (1, 1)
