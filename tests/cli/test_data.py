"""`phinetune data check` and `data preview`: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from phinetune.base.errors import DataError, ModelError, SettingsError
from phinetune.cli.data import data_app
from phinetune.cli.data_view import preview_rows, row_text, visible
from phinetune.data.reading import load_examples
from phinetune.models.catalog import demo_folder
from phinetune.text.render import load_renderer

TURNS = [{"role": "user", "content": "Hi <|end|> \x1b[2J"}, {"role": "assistant", "content": "Hello\nyou"}]
GOOD = json.dumps({"messages": TURNS})
BAD = '{"messages": [{"role": "user", "content": "Hi"}]}'


def run(*args: str) -> Result:
    return CliRunner().invoke(data_app, list(args), env={"COLUMNS": "200"})


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "train.json"
    path.write_text(f"{GOOD}\n\n{GOOD}\n", "utf-8")
    return path


def test_check_counts_and_offers_the_next_command(good: Path) -> None:
    result = run("check", str(good))
    assert result.exit_code == 0
    assert "2 sound examples" in result.output
    assert "2 user, 2 assistant (2 trained)" in result.output
    assert f"phinetune data preview {good}" in result.output


def test_check_names_faults_and_exits_with_2(good: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad file.json"
    bad.write_text(f"{BAD}\n" * 30, "utf-8")
    result = run("check", str(good), str(bad))
    assert result.exit_code == 2
    assert "error no_assistant  30 times" in result.output
    assert f"{bad}:3 messages: no assistant turn" in result.output
    assert f"{bad}:4 " not in result.output
    assert "and 27 more places" in result.output
    assert f"phinetune data check {good} '{bad}'" in result.output


def test_errors_are_shown_before_warnings(good: Path) -> None:
    good.write_text(f"{GOOD}\n" * 25 + BAD, "utf-8")
    output = run("check", str(good)).output
    assert (
        output.index("error no_assistant")
        < output.index("warning exact_duplicate")
        < output.index("note few_rows")
    )


def test_check_says_what_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes("question;answer\r\nWhy?;So.\r\n".encode("utf-16"))
    output = run("check", str(path)).output
    assert "CSV of prompts and answers, UTF-16, byte order mark, Windows line ends" in output


def test_check_takes_columns_by_name(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"phrase": "So happy!", "tone": "joy"}\n', "utf-8")
    assert "--map prompt=phrase --map answer=tone" in run("check", str(path)).output
    result = run("check", str(path), "--map", "prompt=phrase", "--map", "answer=tone")
    assert result.exit_code == 0
    assert "1 sound example" in result.output


def test_check_counts_tokens_of_a_model(good: Path) -> None:
    output = run("check", str(good), "--model", "demo", "--seqlen", "16").output
    assert "over_long" in output
    assert "of the answer is lost" in output
    assert "warning no_trained_token" not in output


def test_check_names_rows_of_a_test_set(good: Path, tmp_path: Path) -> None:
    output = run("check", str(good), "--test", str(good)).output
    assert "leak_row" in output
    assert "is row" in output


def test_check_ranks_rows_by_the_base(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [("What do you like?", "I like to play with my dog.")] * 30
    rows.append(("What do you like?", "zqx vvkj wpq zzj qqx jjk"))
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns), "utf-8")
    report = json.loads(run("check", str(path), "--noise", "demo", "--json").stdout)["files"][0]
    found = [finding for finding in report["findings"] if finding["rule"] == "label_noise"]
    assert [finding["line"] for finding in found] == [31]


@pytest.mark.parametrize(
    "option", [("--keep", "preferd"), ("--tools", "txt"), ("--toxic", "al"), ("--map", "a")]
)
def test_a_misspelt_option_is_explained(option: tuple[str, str], good: Path) -> None:
    result = run("check", str(good), *option)
    assert isinstance(result.exception, SettingsError)
    assert result.exception.do


def test_check_as_json_holds_every_finding(good: Path) -> None:
    good.write_text(f"{BAD}\n" * 30, "utf-8")
    result = run("check", str(good), "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["is_sound"]) == (2, False)
    (file,) = report["files"]
    assert (file["num_errors"], len(file["findings"])) == (30, 30)
    assert file["findings"][29]["line"] == 30
    assert file["counts"] == {"no_assistant": 30}


def test_check_of_a_missing_file_exits_with_2(tmp_path: Path) -> None:
    result = run("check", str(tmp_path / "none.json"))
    assert result.exit_code == 2
    assert "no such file" in result.output


def test_preview_marks_trained_and_control_tokens(good: Path) -> None:
    result = run("preview", str(good), "--model", "demo", "--rows", "1")
    assert result.exit_code == 0
    assert f"{good}:1 " in result.output
    assert "{{<|user|>}} Hi <|end|> \\x1b[2J{{<|end|>}}" in result.output
    assert "[[Hello↵\nyou]][[{{<|end|>}}]]" in result.output
    assert "legend" in result.output
    assert "\x1b" not in result.output
    assert f"{good}:3 " not in result.output


def test_preview_strikes_what_lies_beyond(good: Path) -> None:
    whole = json.loads(run("preview", str(good), "--json").stdout)["rows"][0]
    result = run("preview", str(good), "--seqlen", str(whole["num_tokens"] - 1))
    assert f"{whole['num_tokens']} tokens, {whole['num_trained']} trained, 1 beyond" in result.output
    assert "~~{{<|endoftext|>}}~~" in result.output


def test_preview_lists_ids(good: Path) -> None:
    renderer = load_renderer(demo_folder())
    lines = run("preview", str(good), "--rows", "1", "--ids").output.splitlines()
    rows = [line.split()[:2] for line in lines if line.strip()[:1].isdigit()]
    ids = renderer.example(load_examples(good)[0]).ids.tolist()
    assert rows == [[str(place), str(id_)] for place, id_ in enumerate(ids)]


def test_preview_as_json_is_what_is_trained_on(good: Path) -> None:
    shown = json.loads(run("preview", str(good), "--json", "--system-prompt", "Be kind.").stdout)
    renderer = load_renderer(demo_folder())
    assert (shown["model"], shown["template"]) == ("demo", "phi3")
    assert shown["stop_ids"] == sorted(renderer.stop_ids)
    rendered = renderer.examples(load_examples(good), system_prompt="Be kind.")
    for row, one in zip(shown["rows"], rendered, strict=True):
        assert [token["id"] for token in row["tokens"]] == one.ids.tolist()
        assert [token["is_trained"] for token in row["tokens"]] == one.trained.tolist()


def test_preview_can_train_on_all(good: Path) -> None:
    (row, _) = json.loads(run("preview", str(good), "--json", "--loss-on", "all").stdout)["rows"]
    assert row["num_trained"] == row["num_tokens"] - 1


def test_colours_tell_the_kinds_apart(good: Path) -> None:
    renderer = load_renderer(demo_folder())
    (row,) = preview_rows(renderer, renderer.examples(load_examples(good, limit=1)), seqlen=3)
    text = row_text(row, has_colour=True)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert len({styles["<|user|>"], styles["Hello↵\nyou"], styles["<|endoftext|>"]}) == 3
    assert [str(span.style).endswith("strike") for span in text.spans].count(False) == 2


@pytest.mark.parametrize("text", ["\x1b[31m", "\x00", "\u202e", "\r", "\u2028"])
def test_nothing_reaches_the_terminal_unescaped(text: str) -> None:
    assert visible(text).isprintable()


REFUSED = {
    "bad rows": (["--rows", "9"], DataError),
    "no such model": (["--model", "./none"], ModelError),
    "loss_on": (["--loss-on", "assistent"], SettingsError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_user_got_wrong_is_a_user_error(case: str, good: Path) -> None:
    options, error = REFUSED[case]
    if error is DataError:
        good.write_text(f"{GOOD}\n{BAD}\n", "utf-8")
    assert isinstance(run("preview", str(good), *options).exception, error)
