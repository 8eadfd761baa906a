"""Rows with a class are never split; too long ones are refused, cut or left out, as was said."""

from __future__ import annotations

import numpy as np
import pytest

from phinetune.base.errors import DataError
from phinetune.data.conversation import PlainText, Source
from phinetune.text.labelled import labelled
from phinetune.training.labelled import fit_labelled


def row(length, line=1):
    example = PlainText(text="x", source=Source(file="train.json", line=line), label="a")
    return labelled(range(length), example, 3)


def test_rows_that_fit_stay_as_they_are():
    rows = [row(4), row(8)]
    found = fit_labelled(rows, 8, "error", "finetune_train_seqlen")
    assert found.rendered == rows
    assert found.indices == [0, 1]
    assert all(kept.num_trained == 1 and kept.trained[-1] for kept in found.rendered)


def test_a_cut_row_tells_its_class_at_its_last_token():
    found = fit_labelled([row(4), row(12)], 8, "cut", "finetune_train_seqlen")
    cut = found.rendered[1]
    assert np.array_equal(cut.ids, np.arange(8))
    assert cut.trained.tolist() == [False] * 7 + [True]
    assert cut.class_number == 3
    assert (found.num_cut, found.num_dropped, found.num_split) == (1, 0, 0)


def test_a_dropped_row_is_counted_and_indices_point_to_the_others():
    found = fit_labelled([row(12), row(4)], 8, "drop", "finetune_train_seqlen")
    assert (found.indices, found.num_dropped) == ([1], 1)
    with pytest.raises(DataError, match="no example is left"):
        fit_labelled([row(12)], 8, "drop", "finetune_train_seqlen")


def test_too_long_rows_are_refused_with_their_lines():
    with pytest.raises(DataError, match="2 rows are longer than 8 tokens") as caught:
        fit_labelled([row(12, 5), row(20, 9), row(3)], 8, "error", "finetune_train_seqlen")
    assert "train.json:5, train.json:9" in caught.value.where
    assert "finetune_train_seqlen: 20" in caught.value.do
