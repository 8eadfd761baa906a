"""Classes come from rows or a file, in an order that does not depend on the rows' order; faults name rows."""

from __future__ import annotations

import json

import pytest

from phinetune.base.errors import DataError, SettingsError
from phinetune.data.classes import Classes, classes_of
from phinetune.data.conversation import Conversation, PlainText, Source
from phinetune.data.findings import Finding
from phinetune.data.reading import load_examples, read_examples


def rows(*labels):
    return [
        PlainText(text="x", source=Source(file="train.json", line=line), label=label)
        for line, label in enumerate(labels, start=1)
    ]


def written(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


CHAT = [{"role": "user", "content": "hello"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "hi"}]


def test_labels_are_read_beside_text_and_messages(tmp_path):
    path = written(
        tmp_path / "train.json",
        {"text": "a", "label": "greeting"},
        {"messages": CHAT, "label": 7},
        {"messages": ANSWERED, "label": "b"},
        {"messages": ANSWERED},
    )
    found = load_examples(path)
    assert [example.label for example in found] == ["greeting", "7", "b", None]
    assert isinstance(found[1], Conversation)
    assert not [item for item in read_examples(path) if isinstance(item, Finding)]


@pytest.mark.parametrize("label", ["", " ", True, 1.5, ["a"], {}])
def test_a_label_that_is_no_name_is_a_fault_of_its_row(tmp_path, label):
    with pytest.raises(DataError, match="1 fault") as caught:
        load_examples(written(tmp_path / "train.json", {"text": "a", "label": label}))
    (finding,) = caught.value.findings
    assert (finding.rule, finding.line, finding.field) == ("label_type", 1, "label")


def test_a_chat_without_answer_still_needs_one_when_it_has_no_label(tmp_path):
    with pytest.raises(DataError) as caught:
        load_examples(written(tmp_path / "train.json", {"messages": CHAT}))
    assert caught.value.findings[0].rule == "no_assistant"


def test_names_are_sorted_and_counted():
    assert classes_of(rows("b", "a", "b")) == Classes(names=("a", "b"), counts=(1, 2))


def test_balanced_weights_have_a_mean_of_1_over_the_rows():
    found = classes_of(rows(*"aaaabbc"), weighting="balanced")
    mean = sum(w * c for w, c in zip(found.weights, found.counts, strict=True)) / 7
    assert mean == pytest.approx(1)
    assert found.weights[2] == pytest.approx(4 * found.weights[0])
    assert classes_of(rows(*"aabb"), weighting="balanced").weights is None


@pytest.mark.parametrize(
    ("name", "text", "weights"),
    [
        ("names.txt", "\ufeffb\n\n a \nc\n", None),
        ("names.json", '["b", "a", "c"]', None),
        ("names.json", '{"b": 1, "a": 4, "c": 1}', (0.4, 1.6, 0.4)),
    ],
)
def test_a_file_gives_order_and_weights(tmp_path, name, text, weights):
    (tmp_path / name).write_text(text)
    found = classes_of(rows("a", "b"), tmp_path / name)
    assert found.names == ("b", "a", "c")
    assert found.counts == (1, 1, 0)
    assert found.weights is None if weights is None else found.weights == pytest.approx(weights)


@pytest.mark.parametrize(
    "text", ['{"a": -1, "b": 1}', '["a", 3]', '["a", "a"]', '"a"', "{", '{"a": NaN, "b": 1}']
)
def test_a_file_that_holds_no_names_is_refused(tmp_path, text):
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(SettingsError):
        classes_of(rows("a", "b"), tmp_path / "names.json")


def test_faults_name_rows_and_the_nearest_class(tmp_path):
    with pytest.raises(DataError, match="1 of 3 rows have no label") as caught:
        classes_of(rows("a", None, "b"))
    assert "train.json:2" in caught.value.where
    with pytest.raises(DataError, match="at least two classes"):
        classes_of(rows("a", "a"))
    (tmp_path / "names.txt").write_text("refund\norder\n")
    with pytest.raises(DataError, match="1 rows have labels") as caught:
        classes_of(rows("refund", "ordr"), tmp_path / "names.txt")
    assert "'order'" in caught.value.why
    with pytest.raises(SettingsError, match="no such labels file"):
        classes_of(rows("a", "b"), tmp_path / "missing.txt")
    (tmp_path / "names.json").write_text('{"a": 1, "b": 2}')
    with pytest.raises(SettingsError, match="in conflict"):
        classes_of(rows("a", "b"), tmp_path / "names.json", "balanced")
