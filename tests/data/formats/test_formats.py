"""Every form of file gives the same examples, says what it is, and names its faults with their place."""

# ruff: noqa: E501 (the tables of cases read best with a case per line)
from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.base.errors import DataError, SettingsError
from phinetune.data.conversation import Conversation, PlainText
from phinetune.data.findings import Finding
from phinetune.data.formats.recognise import data_suffix, recognise
from phinetune.data.formats.row_forms import ReadOptions, column_options
from phinetune.data.reading import load_examples, read_examples, resolve_dataset

PAIRS = [("Hi", "Hello"), ('Say "x", or y', "x\ny"), ("Grüße", "ありがとう")]


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def chat(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def table(delimiter: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([("question", "answer"), *PAIRS])
    return out.getvalue().encode()


def parquet(rows: list[dict[str, str]]) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    out = io.BytesIO()
    writer.write_table(arrow.Table.from_pylist(rows), out)
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    return bytes(arrow.compress(data, codec="zstd", asbytes=True))


ROWS = [chat(question, answer) for question, answer in PAIRS]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    for question, answer in PAIRS
]
FORMS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "messages": ("a.jsonl", lambda: lines(*ROWS), "JSON Lines of messages"),
    "lists of messages": (
        "a.jsonl",
        lambda: lines(*[row["messages"] for row in ROWS]),
        "JSON Lines of messages",
    ),
    "array": ("a.json", lambda: json.dumps(ROWS).encode(), "JSON array of messages"),
    "indented array": ("a.json", lambda: json.dumps(ROWS, indent=2).encode(), "JSON array of messages"),
    "sharegpt": ("a.json", lambda: lines(*SHAREGPT), "JSON Lines of ShareGPT conversations"),
    "alpaca": (
        "a.json",
        lambda: json.dumps([{"instruction": q, "input": "", "output": a} for q, a in PAIRS]).encode(),
        "JSON array of Alpaca instructions",
    ),
    "pairs": (
        "a.jsonl",
        lambda: lines(*[{"prompt": q, "completion": a} for q, a in PAIRS]),
        "JSON Lines of prompts",
    ),
    "csv": ("a.csv", lambda: table(","), "CSV of prompts and answers, Windows line ends"),
    "csv with semicolons": ("a.csv", lambda: table(";"), "CSV of prompts and answers"),
    "tsv": ("a.tsv", lambda: table("\t"), "TSV of prompts and answers"),
    "parquet": (
        "a.parquet",
        lambda: parquet([{"prompt": q, "response": a} for q, a in PAIRS]),
        "Parquet of prompts and answers",
    ),
    "gzip": ("a.jsonl.gz", lambda: gzip.compress(lines(*ROWS)), "JSON Lines of messages, packed with gzip"),
    "xz": ("a.csv.xz", lambda: lzma.compress(table(",")), "packed with xz"),
    "zstd": ("a.jsonl.zst", lambda: zstd(lines(*ROWS)), "packed with zstd"),
    "utf-16": ("a.jsonl", lambda: lines(*ROWS).decode().encode("utf-16"), "UTF-16, byte order mark"),
    "utf-16 without mark": (
        "a.jsonl",
        lambda: lines(ROWS[0]).decode().encode("utf-16-be"),
        "UTF-16 (big endian)",
    ),
    "utf-32": ("a.jsonl", lambda: lines(*ROWS).decode().encode("utf-32"), "UTF-32-LE"),
    "utf-16 array": ("a.json", lambda: json.dumps(ROWS).encode("utf-16"), "JSON array of messages, UTF-16"),
    "utf-16 table": ("a.csv", lambda: table(",").decode().encode("utf-16"), "CSV of prompts"),
    "mark and line ends": (
        "a.jsonl",
        lambda: b"\xef\xbb\xbf" + lines(*ROWS).replace(b"\n", b"\r\n"),
        "byte order mark, Windows line ends",
    ),
    "text parts": (
        "a.jsonl",
        lambda: lines(
            *[
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "text", "text": q}]},
                        {"role": "assistant", "content": a},
                    ]
                }
                for q, a in PAIRS
            ]
        ),
        "JSON Lines of messages",
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_every_form_gives_the_same_conversations(case: str, tmp_path: Path) -> None:
    name, content, form = FORMS[case]
    path = tmp_path / name
    path.write_bytes(content())
    found = recognise(path)
    assert form in str(found)
    expected = PAIRS[:1] if case == "utf-16 without mark" else PAIRS
    examples = [example for example in load_examples(path) if isinstance(example, Conversation)]
    assert [tuple(message.content for message in example.messages) for example in examples] == expected
    assert [message.role for message in examples[0].messages] == ["user", "assistant"]


def test_columns_are_named_by_the_user(tmp_path: Path) -> None:
    path = tmp_path / "tones.jsonl"
    path.write_bytes(
        lines({"phrase": "So happy!", "tone": "joy", "id": 3}, {"phrase": "No.", "tone": 0, "id": 4})
    )
    options = ReadOptions(columns=column_options(["prompt=phrase", "answer=tone"]))
    assert "the columns you named" in str(recognise(path, options))
    items = list(read_examples(path, options))
    (warning,) = [item for item in items if isinstance(item, Finding)]
    assert (warning.rule, warning.field) == ("unknown_key", "id")
    answers = [item.messages[-1].content for item in items if isinstance(item, Conversation)]
    assert answers == ["joy", "0"]
    with pytest.raises(DataError, match="2 faults"):
        load_examples(path)


@pytest.mark.parametrize(
    ("pairs", "told"),
    [(["promt=a"], "prompt=a"), (["prompt"], "prompt="), (["prompt=a"], "answer"), (["=a"], "for")],
)
def test_a_wrong_mapping_is_explained(pairs: list[str], told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        column_options(pairs)
    assert told in caught.value.do


def test_alpaca_keeps_the_input_and_the_system(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"system": "Be short.", "instruction": "Add.", "input": "1 2", "output": 3}))
    (example,) = load_examples(path)
    assert isinstance(example, Conversation)
    assert [(m.role, m.content) for m in example.messages] == [
        ("system", "Be short."), ("user", "Add.\n\n1 2"), ("assistant", "3"),
    ]  # fmt: skip


def test_the_preferred_answer_of_a_pair_can_be_kept(tmp_path: Path) -> None:
    turn = [{"role": "assistant", "content": "Yes"}]
    openai = {
        "input": {"messages": [{"role": "user", "content": "Well?"}]},
        "preferred_output": turn,
        "non_preferred_output": [{"role": "assistant", "content": "No"}],
    }
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(openai, {"prompt": "Well?", "chosen": "Yes", "rejected": "No"}))
    assert "preference pairs (DPO)" in str(recognise(path))
    examples = load_examples(path, options=ReadOptions(keep_preferred=True))
    assert len(examples) == 2
    for example in examples:
        assert isinstance(example, Conversation)
        assert [message.content for message in example.messages] == ["Well?", "Yes"]


def test_tools_can_be_written_out_as_text(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "now", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "rain", "name": "now", "tool_call_id": "1"},
            {"role": "assistant", "content": "It rains."},
        ],
        "tools": [{"name": "now"}],
    }
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(row))
    with pytest.raises(DataError):
        load_examples(path)
    (example,) = load_examples(path, options=ReadOptions(tools_as_text=True))
    assert isinstance(example, Conversation)
    assert [(m.role, m.content) for m in example.messages] == [
        ("system", 'Tools: [{"name": "now"}]'),
        ("user", "Weather?"),
        ("assistant", '{"name": "now", "arguments": "{}"}'),
        ("user", "Result of now: rain"),
        ("assistant", "It rains."),
    ]


ROW = json.dumps(ROWS[0])
# case: (text, rules, lines, how many rows are read all the same)
BROKEN_ARRAYS = {
    "a broken row": (f"[\n{ROW},\n{{'a': 1}},\n{ROW}\n]", ["json"], [3], 2),
    "a duplicate key": (f'[\n{ROW},\n{{"text": "a", "text": "b"}},\n{ROW}\n]', ["duplicate_key"], [3], 2),
    "NaN": (f'[{ROW}, {{"text": NaN}}, {ROW}]', ["not_finite"], [2], 2),
    "cut short": (f"[{ROW}, {ROW[:20]}", ["json", "json"], [2, 1], 1),
    "never closed": (f"[\n{ROW}\n", ["json"], [3], 1),
    "something after it": (f"[{ROW}]\n{ROW}", ["json"], [2], 1),
    "no row": ("[]", ["empty"], [0], 0),
    "numbers": ("[1, 2]", ["not_an_object", "not_an_object"], [1, 2], 0),
    "too deep": ("[" * 100_000, ["nesting", "json"], [1, 1], 0),
    "an indented row broken": (
        json.dumps(ROWS, indent=1).replace('"Hello"', "'Hello'"), ["json"], [10], 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_ARRAYS)
def test_after_a_broken_row_of_an_array_reading_goes_on(case: str, tmp_path: Path) -> None:
    text, rules, places, num_read = BROKEN_ARRAYS[case]
    path = tmp_path / "a.json"
    path.write_text(text, "utf-8")
    items = list(read_examples(path))
    found = [item for item in items if isinstance(item, Finding)]
    assert [finding.rule for finding in found] == rules
    assert [finding.line for finding in found] == places
    assert sum(isinstance(item, Conversation) for item in items) == num_read


def test_a_row_longer_than_a_piece_of_an_array_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([chat("a", "long " * 900_000), chat("b", "c")]), "utf-8")
    first, second = load_examples(path)
    assert isinstance(first, Conversation)
    assert len(first.messages[1].content) == 4_500_000
    assert isinstance(second, Conversation)


def test_faults_of_a_table_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer\nHi,"Hello\nyou"\nbroken\n"a" b,c\nHi,Hello\n', "utf-8")
    items = list(read_examples(path))
    found = [item for item in items if isinstance(item, Finding)]
    assert [(finding.rule, finding.line) for finding in found] == [("table", 4), ("table", 5)]
    assert [item.source.line for item in items if isinstance(item, Conversation)] == [2, 6]
    path.write_text("prompt,prompt\na,b\n", "utf-8")
    assert [item.rule for item in read_examples(path) if isinstance(item, Finding)] == ["columns"]


@pytest.mark.parametrize("packed", [gzip.compress, lzma.compress, zstd])
def test_a_packed_file_cut_short_is_a_finding(packed: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed(lines(*ROWS * 200))[:-20])
    found = [item for item in read_examples(path) if isinstance(item, Finding)]
    assert [finding.rule for finding in found][-1:] == ["damaged"]


def test_a_missing_column_reader_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, packed = tmp_path / "a.parquet", tmp_path / "a.jsonl.zst"
    path.write_bytes(parquet([{"text": "a"}]))
    packed.write_bytes(zstd(b"{}"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for file in (path, packed):
        (found,) = [item for item in read_examples(file) if isinstance(item, Finding)]
        assert found.rule == "unreadable"
        assert "phinetune[data]" in found.fix


def test_a_folder_of_datasets_is_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    rows = arrow.Table.from_pylist([{"prompt": q, "completion": a} for q, a in PAIRS])
    for part in ("train", "test"):
        folder = tmp_path / "set" / part
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}", "utf-8")
        with arrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", rows.schema) as writer:
            writer.write_table(rows)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test", "../.."]}', "utf-8")
    assert len(load_examples(tmp_path / "set")) == 3
    assert len(load_examples(tmp_path / "set" / "test")) == 3
    assert str(recognise(tmp_path / "set")) == "datasets folder of prompts and answers"
    with pytest.raises(DataError) as caught:
        resolve_dataset("set", tmp_path)
    assert "data convert" in caught.value.do
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    (hub / "train-00000-of-00001.parquet").write_bytes(parquet([{"prompt": "a", "completion": "b"}]))
    (hub / "test-00000-of-00001.parquet").write_bytes(parquet([{"prompt": "c", "completion": "d"}]))
    (example,) = load_examples(tmp_path / "hub")
    assert isinstance(example, Conversation)
    assert example.messages[0].content == "a"


def test_markdown_is_split_at_its_headings(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("# One\n\ntext\n\n```\n# code\n```\n\n## Two\n\n### Part\nmore\n", "utf-8")
    examples = [example for example in load_examples(path) if isinstance(example, PlainText)]
    assert [(example.text, example.source.line) for example in examples] == [
        ("# One\n\ntext\n\n```\n# code\n```", 1),
        ("## Two\n\n### Part\nmore", 9),
    ]


def test_a_packed_training_set_is_found_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.jsonl.gz").write_bytes(gzip.compress(lines(*ROWS)))
    (tmp_path / "dataset" / "test.csv").write_bytes(table(","))
    files = resolve_dataset("dataset", tmp_path)
    assert files.test is not None
    assert len(load_examples(files.train)) == len(load_examples(files.test)) == 3
    assert data_suffix(files.train) == ".jsonl.gz"


def peak_bytes(path: Path) -> int:
    tracemalloc.start()
    for _ in read_examples(path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_memory_does_not_grow_with_rows(form: str, tmp_path: Path) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")

    def written(count: int) -> Path:
        rows = [{"prompt": f"question {number} " * 80, "completion": "answer"} for number in range(count)]
        path = tmp_path / f"{count}.{form}"
        if form == "csv":
            out = io.StringIO()
            writer = csv.DictWriter(out, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
            path.write_text(out.getvalue(), "utf-8")
        else:
            path.write_bytes(
                parquet(rows)
                if form == "parquet"
                else json.dumps(rows).encode()
                if form == "json"
                else lines(*rows)
            )
        return path

    # Of two tries the lesser: what a library's threads hold at once is not the same each time.
    few, many = (min(peak_bytes(path) for _ in range(2)) for path in (written(3_000), written(6_000)))
    assert many < few * 1.2


KINDS = [
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".txt",
    ".md",
    ".parquet",
    ".arrow",
    ".jsonl.gz",
    ".xz",
    ".jsonl.zst",
]
PIECES = [
    b'{"messages": [{"role": "user", "content": "a"}]}', b"[", b"]", b"{", b"}", b",", b'"', b"\\", b"\n", b"\r\n",
    b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b\x08\x00", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1",
    b'{"prompt": "a", "completion": 1e999}', b'{"text": "\\ud800"}', b"prompt,answer", b"\x00", b"# a",
    b'{"conversations": [{"from": [], "value": {}}]}', b'{"instruction": null, "output": []}', b"-", b"9" * 5000,
    b'{"input": 3, "preferred_output": [{}]}', b'{"messages": {"a": 1}}', b'[{"role": 1}]', b'{"messages": [{}]}',
]  # fmt: skip


@given(
    st.sampled_from(KINDS),
    st.lists(st.binary(max_size=20) | st.sampled_from(PIECES), max_size=12),
    st.booleans(),
)
def test_no_bytes_make_any_reader_fail(
    tmp_path_factory: pytest.TempPathFactory, kind: str, pieces: list[bytes], is_open: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / f"bytes{kind}"
    path.write_bytes(b"".join(pieces))
    options = ReadOptions(keep_preferred=is_open, tools_as_text=is_open)
    recognise(path, options)
    for item in read_examples(path, options):
        assert isinstance(item, Finding | Conversation | PlainText)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "role", "content", "weight", "tool_calls", "tools", "conversations", "from", "value",
                 "instruction", "output", "prompt", "completion", "text", "input", "preferred_output", "chosen", "type"]
            ),
            inner,
            max_size=4,
        ),
        max_leaves=12,
    )
)  # fmt: skip
def test_no_json_value_makes_reading_fail(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.jsonl"
    path.write_text(json.dumps(value) + "\n", "utf-8")
    for is_open in (False, True):
        options = ReadOptions(keep_preferred=is_open, tools_as_text=is_open)
        recognise(path, options)
        for item in read_examples(path, options):
            assert isinstance(item, Finding | Conversation | PlainText)
