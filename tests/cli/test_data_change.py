"""The commands on data that write files or show them whole: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planted_faults import Sentences, chat
from typer.testing import CliRunner, Result

from phinetune.base.errors import DataError, SettingsError, UserError
from phinetune.cli.data import data_app


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(data_app, list(map(str, args)), env={"COLUMNS": "200"})


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    sentences = Sentences()
    rows: list[Any] = [sentences.row() for _ in range(40)]
    rows += [rows[0], chat("Who?", "CafÃ©, ann@example.org"), {"messages": []}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_clean_says_what_it_did_and_what_is_next(messy: Path) -> None:
    result = run("clean", messy)
    folder = messy.with_name("train-clean")
    assert result.exit_code == 0
    assert "43 rows read, 41 kept" in result.output
    assert "exact_duplicate" in result.output
    assert "[EMAIL_1]" in result.output
    assert f"phinetune data check {folder / 'train.jsonl'}" in result.output
    assert isinstance(run("clean", messy).exception, UserError)
    assert "nothing to clean" in run("clean", folder / "train.jsonl").output


def test_clean_takes_rules(messy: Path, tmp_path: Path) -> None:
    result = run("clean", messy, "--only", "mojibake", "--dry-run", "--json")
    assert json.loads(result.stdout)["changed"] == {"mojibake": 1}
    assert json.loads(result.stdout)["folder"] is None
    result = run("clean", messy, "--without", "mojibake", "--to", tmp_path / "b", "--json")
    assert json.loads(result.stdout)["changed"] == {"private_data": 1}
    assert isinstance(run("clean", messy, "--rule", "over_long").exception, SettingsError)
    long = run(
        "clean", messy, "--only", "over_long", "--model", "demo", "--seqlen", "100", "--dry-run", "--json"
    )
    assert json.loads(long.stdout)["dropped"]["over_long"] > 5


def test_the_road_from_messy_to_split(messy: Path, tmp_path: Path) -> None:
    assert run("clean", messy).exit_code == 0
    cleaned = tmp_path / "train-clean" / "train.jsonl"
    result = run("split", cleaned, "--to", tmp_path / "dataset", "--test", "0.25")
    assert result.exit_code == 0
    assert "train.jsonl" in result.output
    for command in (
        ("convert", cleaned, "--to", tmp_path / "a.csv"),
        ("sample", cleaned, "--to", tmp_path / "b.jsonl", "--rows", "5"),
        ("merge", tmp_path / "b.jsonl", cleaned, "--to", tmp_path / "c.jsonl"),
    ):
        assert run(*command).exit_code == 0
        assert run(*command).exit_code != 0  # what is there stays
    split = json.loads(run("split", cleaned, "--to", tmp_path / "d", "--json").stdout)
    assert sum(split["rows"].values()) == 41


def test_stats_count_and_draw(messy: Path, tmp_path: Path) -> None:
    result = run("stats", messy, "--epochs", "3", "--price", "2", "--svg", tmp_path / "a.svg")
    assert result.exit_code == 0
    assert "rows by length in tokens" in result.output
    assert "3 epochs" in result.output
    assert (tmp_path / "a.svg").read_text("utf-8").startswith("<svg")
    record = json.loads(run("stats", messy, "--epochs", "2", "--price", "10", "--json").stdout)
    assert record["trained_tokens_in_all_epochs"] == 2 * record["tokens"]["num_trained"]
    assert record["cost"] == pytest.approx(record["trained_tokens_in_all_epochs"] / 1e5)
    assert sum(bin["count"] for bin in record["histogram"]) == record["num_examples"]


def test_report_and_card_are_written(messy: Path, tmp_path: Path) -> None:
    assert run("report", messy, "--to", tmp_path / "a.html", "--toxic", "none").exit_code == 0
    assert "mojibake" in (tmp_path / "a.html").read_text("utf-8")
    result = run("card", messy, "--licence", "MIT")
    assert "not stated: purpose" in result.output
    assert "**Licence**: MIT" in messy.with_name("train.jsonl.card.md").read_text("utf-8")
    assert isinstance(run("card", messy).exception, UserError)
    assert isinstance(run("stats", tmp_path / "none.jsonl").exception, UserError)


def test_rules_are_listed() -> None:
    assert "near_duplicate" in run("rules").output
    assert {rule["id"] for rule in json.loads(run("rules", "--json").stdout)} >= {"json", "mojibake", "toxic"}


def test_options_for_reading_are_carried_on(tmp_path: Path) -> None:
    path = tmp_path / "odd names.csv"
    path.write_text(
        "customer text,kind\n" + "\n".join(f"Where is parcel {n}?,late" for n in range(12)), "utf-8"
    )
    flags = "--map 'prompt=customer text' --map answer=kind"
    output = run("check", str(path)).output.replace("\n", " ")
    assert "--map prompt='customer text' --map answer=kind" in output
    named = ["--map", "prompt=customer text", "--map", "answer=kind"]
    assert f"data convert '{path}' {flags} --to" in run("check", str(path), *named).output
    path.write_text(path.read_text("utf-8") + "\n<p>Hello?</p>,late", "utf-8")
    assert f"data clean '{path}' {flags}" in run("check", str(path), *named).output
    assert f"data report '{path}' {flags}" in run("stats", str(path), *named).output


@pytest.mark.parametrize("command", ["clean", "split", "stats", "report", "card", "convert"])
def test_a_missing_file_is_said_with_the_nearest_name(command: str, messy: Path) -> None:
    result = run(command, str(messy.with_name("trainn.jsonl")), "--to", "out.jsonl")
    if command == "stats":
        result = run(command, str(messy.with_name("trainn.jsonl")))
    assert isinstance(result.exception, DataError)
    assert result.exception.what == "no such file"
    assert messy.name in result.exception.do


def test_a_missing_test_set_is_no_test_set_without_leaks(messy: Path) -> None:
    result = run("check", str(messy), "--test", "none.jsonl")
    assert isinstance(result.exception, DataError)
