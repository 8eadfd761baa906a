"""Reading accepts what people write and names every fault with its line, field and fix."""

# ruff: noqa: E501 (the tables of cases read best with a case per line)
from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.base.errors import DataError
from phinetune.data.checking import check_file
from phinetune.data.conversation import Conversation, PlainText
from phinetune.data.findings import EXCERPT_CHARS, Finding, excerpt
from phinetune.data.reading import load_examples, read_examples

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
INDENTED = json.dumps(json.loads(GOOD), indent=2)


def write(folder: Path, text: str | bytes, name: str = "train.json") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def findings(path: Path) -> list[Finding]:
    return [item for item in read_examples(path) if isinstance(item, Finding)]


def chat(*turns: dict[str, object]) -> str:
    return json.dumps({"messages": list(turns)})


USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}

ACCEPTED = {
    "one object per line": (f"{GOOD}\n{GOOD}\n", [1, 2]),
    "no line end after the last": (f"{GOOD}\n{GOOD}", [1, 2]),
    "blank lines and trailing spaces": (f"\n{GOOD}  \n\n \t\n{GOOD} \n\n", [2, 5]),
    "windows line ends": (f"{GOOD}\r\n{GOOD}\r\n", [1, 2]),
    "every line indented": (f"    {GOOD}\n    {GOOD}\n", [1, 2]),
    "indented objects one after another": (f"{INDENTED}\n{INDENTED}\n{GOOD}\n", [1, 13, 25]),
    "indented objects with blank lines": (f"{INDENTED}\n\n\n{INDENTED}", [1, 15]),
    "byte order mark": ("\ufeff" + GOOD, [1]),
    "weights": (chat(USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}), [1]),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_people_write_is_accepted(case: str, tmp_path: Path) -> None:
    text, lines = ACCEPTED[case]
    path = write(tmp_path, text)
    assert findings(path) == []
    examples = load_examples(path)
    assert [example.source.line for example in examples] == lines
    assert all(example.source.file == str(path) for example in examples)


# fmt: off
# case: (row, rule, field, part of the fix). The row stands on line 3, between two good rows.
REFUSED = {
    "a bracket too few": (GOOD[:-2] + "}", "json", "", "close"),
    "broken JSON": ('{"messages": [}', "json", "", "double quotes"),
    "single quotes": ("{'messages': []}", "json", "", "single quotes"),
    "missing comma": ('{"messages": [] "weight": 1}', "json", "", "close or separate"),
    "comma after the object": (GOOD + ",", "json", "", "delete the comma"),
    "two objects on a line": (GOOD + GOOD, "json", "", "one object per line"),
    "raw tab in text": ('{"text": "a\tb"}', "json", "", "\\t"),
    "bad escape": ('{"text": "C:\\data"}', "json", "", "\\\\"),
    "text without end": ('{"text": "a', "json", "", "\\n"),
    "not JSON at all": ("Hello", "json", "", ""),
    "NaN": ('{"text": "a", "score": NaN}', "not_finite", "", "null"),
    "Infinity": ('{"text": "a", "score": -Infinity}', "not_finite", "", "null"),
    "duplicate key": ('{"text": "a", "text": "b"}', "duplicate_key", "", "keep one"),
    "nested too deeply": ('{"a":' * 100_000, "nesting", "", "messages"),
    "huge number": ('{"text": "a", "n": ' + "9" * 5000 + "}", "number", "", "text"),
    "a list": ("[1, 2]", "not_an_object", "", "messages"),
    "a string": ('"Hello"', "not_an_object", "", "messages"),
    "no messages": ('{"phrase": "a", "tone": "b"}', "no_messages", "", "--map prompt=phrase --map answer=tone"),
    "no answer": ('{"query": "a"}', "no_messages", "", "no answer"),
    "bare message": ('{"role": "user", "content": "a"}', "no_messages", "", "bare message"),
    "preference pair": ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "preference_pair", "chosen", "--keep preferred"),
    "empty answer of a pair": ('{"prompt": "a", "completion": " "}', "empty_content", "completion", "delete"),
    "empty answer of Alpaca": ('{"instruction": "a", "output": ""}', "empty_content", "output", "delete"),
    "ShareGPT role": ('{"conversations": [{"from": "usr", "value": "a"}]}', "role", "conversations[0]", '"user"'),
    "misspelt messages": ('{"mesages": []}', "no_messages", "", 'did you mean "messages"'),
    "messages and text": ('{"messages": [], "text": "a"}', "two_forms", "", "delete"),
    "messages no list": ('{"messages": "Hi"}', "messages_type", "messages", "role"),
    "no turns": (chat(), "no_turns", "messages", "turns"),
    "message no object": ('{"messages": ["Hi"]}', "message_type", "messages[0]", "role"),
    "no role": (chat({"content": "Hi"}, ASSISTANT), "no_role", "messages[0].role", "user"),
    "unknown role": (chat(USER | {"role": "usr"}, ASSISTANT), "role", "messages[0].role", '"user"'),
    "role in capitals": (chat(USER, ASSISTANT | {"role": "Assistant"}), "role", "messages[1].role", '"assistant"'),
    "other name of a role": (chat({"role": "human", "content": "a"}, ASSISTANT), "role", "messages[0].role", '"user"'),
    "tool role": (chat(USER, ASSISTANT, {"role": "tool", "content": "a"}), "role", "messages[2].role", "--tools text"),
    "role no text": (chat({"role": 1, "content": "a"}, ASSISTANT), "role", "messages[0].role", "user"),
    "no content": (chat({"role": "user"}, ASSISTANT), "no_content", "messages[0].content", "text"),
    "empty content": (chat(USER, ASSISTANT | {"content": ""}), "empty_content", "messages[1].content", "delete"),
    "blank content": (chat(USER | {"content": " \n"}, ASSISTANT), "empty_content", "messages[0].content", "delete"),
    "content null": (chat(USER, ASSISTANT | {"content": None}), "content_type", "messages[1].content", "text"),
    "content a number": (chat(USER | {"content": 5}, ASSISTANT), "content_type", "messages[0].content", "text"),
    "content parts": (chat(USER | {"content": [{"text": "a"}]}, ASSISTANT), "content_type", "messages[0].content", "images"),
    "no assistant": (chat(USER), "no_assistant", "messages", "answer"),
    "all weights 0": (chat(USER, ASSISTANT | {"weight": 0}), "all_weights_0", "messages", "weight 1"),
    "weight 2": (chat(USER, ASSISTANT | {"weight": 2}), "weight", "messages[1].weight", "0:"),
    "weight true": (chat(USER, ASSISTANT | {"weight": True}), "weight", "messages[1].weight", "0:"),
    "weight of a user": (chat(USER | {"weight": 1}, ASSISTANT), "weight", "messages[0].weight", "delete"),
    "misspelt weight": (chat(USER, ASSISTANT | {"wieght": 0}), "unknown_key", "messages[1].wieght", '"weight"'),
    "tool calls": (chat(USER, ASSISTANT | {"tool_calls": [1]}), "tools", "messages[1].tool_calls", "--tools text"),
    "tools of a pair": ('{"prompt": "a", "completion": "b", "tools": [1]}', "tools", "tools", "--tools text"),
    "system late": (chat(USER, {"role": "system", "content": "a"}, ASSISTANT), "system_order", "messages[1]", "front"),
    "lone surrogate": ('{"text": "a \\ud800 b"}', "surrogate", "text", "anew"),
    "surrogate in a turn": (chat(USER, {"role": "assistant", "content": "\udfff"}), "surrogate", "messages[1].content", "anew"),
    "text no text": ('{"text": 5}', "text_type", "text", "quotes"),
    "empty text": ('{"text": " "}', "empty_text", "text", "delete"),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED)
def test_a_fault_is_named_with_line_field_and_fix(case: str, tmp_path: Path) -> None:
    row, rule, field, fix = REFUSED[case]
    path = write(tmp_path, f"{GOOD}\n\n{row}\n{GOOD}\n")
    (found,) = [finding for finding in findings(path) if finding.is_error]
    assert (found.rule, found.line, found.field) == (rule, 3, field)
    assert fix in found.fix
    assert found.message
    assert len(found.excerpt) <= EXCERPT_CHARS
    assert found.excerpt.isprintable()
    assert [item.source.line for item in read_examples(path) if not isinstance(item, Finding)] == [1, 4]
    with pytest.raises(DataError, match="1 fault") as caught:
        load_examples(path)
    assert caught.value.findings == (found,)


# fmt: off
WARNED = {
    "unknown key": (chat(USER, ASSISTANT)[:-1] + ', "id": 7}', "unknown_key", "id"),
    "unknown key of a message": (chat(USER | {"name": "Ann"}, ASSISTANT), "unknown_key", "messages[0].name"),
    "empty system": (chat({"role": "system", "content": ""}, USER, ASSISTANT), "empty_system", "messages[0].content"),
    "no user": (chat(ASSISTANT), "no_user", "messages"),
    "no answer": (chat(USER, ASSISTANT, USER), "no_answer", "messages[2]"),
    "same role twice": (chat(USER, ASSISTANT, ASSISTANT), "same_role", "messages[2]"),
    "control surface": (chat(USER | {"content": "<|end|>"}, ASSISTANT), "control_text", "messages[0].content"),
    "lost character": ('{"text": "caf\ufffd"}', "lost_character", "text"),
}
# fmt: on


@pytest.mark.parametrize("case", WARNED)
def test_a_warning_does_not_stop(case: str, tmp_path: Path) -> None:
    row, rule, field = WARNED[case]
    path = write(tmp_path, row)
    (found,) = findings(path)
    assert (found.rule, found.severity, found.field) == (rule, "warning", field)
    assert len(load_examples(path)) == 1


def test_an_unknown_key_is_told_once(tmp_path: Path) -> None:
    row = chat(USER, ASSISTANT)[:-1] + ', "id": 7}'
    assert [finding.line for finding in findings(write(tmp_path, f"{row}\n{row}\n"))] == [1]


BROKEN_INDENTED = {
    "no closing brace": (INDENTED.rstrip("}"), 1),
    "no closing bracket": (INDENTED.replace("]", ""), 12),
    "missing comma": (INDENTED.replace('"Hi"\n    },', '"Hi"\n    }'), 7),
    "text without end": (INDENTED.replace('"Hi"', '"Hi'), 5),
    "cut short": ('{"messages": [{"role": "user", "content": "Hi"},', 1),
}


@pytest.mark.parametrize("case", BROKEN_INDENTED)
@pytest.mark.parametrize("following", [GOOD, "\n" + GOOD, INDENTED])
def test_after_a_broken_object_reading_goes_on(case: str, following: str, tmp_path: Path) -> None:
    broken, line = BROKEN_INDENTED[case]
    path = write(tmp_path, f"{broken}\n{following}\n")
    items = list(read_examples(path))
    assert [item.line for item in items if isinstance(item, Finding)] == [line]
    assert len([item for item in items if isinstance(item, Conversation)]) == 1


FILES = {
    "empty": (b"", "empty"),
    "blank": (b" \n\n", "empty"),
    "mark only": (b"\xef\xbb\xbf", "empty"),
    "half a character at the end": (GOOD.encode("utf-16")[:-1], "encoding"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_read_gives_one_finding(case: str, tmp_path: Path) -> None:
    content, rule = FILES[case]
    (found,) = findings(write(tmp_path, content))
    assert (found.rule, found.line) == (rule, 1 if rule == "encoding" else 0)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    bad = '{"text": "café"}'.encode("latin-1")
    path = write(tmp_path, GOOD.encode() + b"\n" + bad + b"\n" + GOOD.encode())
    (found,) = findings(path)
    assert (found.rule, found.line) == ("encoding", 2)
    assert "0xe9 at character 14" in found.message
    assert len([item for item in read_examples(path) if isinstance(item, Conversation)]) == 2


def test_a_missing_file_offers_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    (found,) = findings(tmp_path / "trian.json")
    assert found.rule == "missing"
    assert "train.json" in found.fix
    assert findings(tmp_path / "no" / "folder.json")[0].rule == "missing"


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert [finding.rule for finding in findings(tmp_path)] == ["is_folder"]


def test_all_findings_come_at_once_and_twenty_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path, f"{chat(USER)}\n" * 23 + GOOD)
    with pytest.raises(DataError) as caught:
        load_examples(path)
    assert len(caught.value.findings) == 23
    text = str(caught.value)
    assert "23 faults" in text
    assert "and 3 more" in text
    assert f"{path}:20 " in text
    assert f"{path}:21 " not in text


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path, f"{GOOD}\n{GOOD}\nbroken")
    assert len(load_examples(path, limit=2)) == 2
    with pytest.raises(DataError):
        load_examples(path, limit=3)


def test_reading_streams(tmp_path: Path) -> None:
    path = write(tmp_path, f"{GOOD}\n")
    items = read_examples(path)
    assert isinstance(next(items), Conversation)
    items.close()  # type: ignore[attr-defined]


def test_a_report_counts(tmp_path: Path) -> None:
    rows = [GOOD, chat(USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT), '{"text": "Hello"}', chat(USER)]
    report = check_file(write(tmp_path, "\n".join(rows)))
    assert (report.num_examples, report.num_conversations, report.num_texts) == (3, 2, 1)
    assert report.roles == {"user": 3, "assistant": 3}
    assert report.num_trained_turns == 2
    assert report.num_characters == 7 + 14 + 5
    assert (report.num_errors, report.is_sound) == (1, False)
    assert report.counts == {"no_assistant": 1, "too_few_rows": 1}
    assert report.form == "JSON Lines of messages"


def test_a_report_of_nothing_is_a_report(tmp_path: Path) -> None:
    report = check_file(tmp_path / "none.json")
    assert (report.num_examples, report.num_errors, report.size_bytes) == (0, 1, 0)


def test_a_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    examples = load_examples(write(tmp_path, "\n\nOne\ntwo.\n\n \nThree.\n", "train.txt"))
    assert all(isinstance(example, PlainText) for example in examples)
    assert [(e.text, e.source.line) for e in examples if isinstance(e, PlainText)] == [
        ("One\ntwo.", 3),
        ("Three.", 7),
    ]


def test_a_text_with_headings_is_split_at_them(tmp_path: Path) -> None:
    text = " \n = Lobster = \n \n It is big . \n It is blue . \n \n = = Diet = = \n \n = = = Young = = = \n \n Fish . \n"
    examples = load_examples(write(tmp_path, text, "wiki.train.tokens"))
    assert [(e.text, e.source.line) for e in examples if isinstance(e, PlainText)] == [
        (" = Lobster = \n It is big . \n It is blue . ", 2),
        (" = = Diet = = \n = = = Young = = = \n Fish . ", 7),
    ]


@given(st.text(max_size=200), st.integers(0, 200))
def test_an_excerpt_is_short_and_printable(text: str, around: int) -> None:
    shown = excerpt(text, around)
    assert len(shown) <= EXCERPT_CHARS
    assert shown.isprintable()


@given(
    st.lists(st.binary(max_size=40) | st.sampled_from([GOOD.encode(), INDENTED.encode(), b"{", b"[", b'"']))
)
def test_no_bytes_make_reading_fail(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("bytes") / "train.json"
    path.write_bytes(b"\n".join(lines))
    for item in read_examples(path):
        assert isinstance(item, Finding | Conversation | PlainText)
