"""The view shows a run's plan, progress and result, on any terminal, without saying a thing twice."""

from __future__ import annotations

import io
from typing import Any

import pytest
from made_up_run import ANSWERS, PLAN, SUMMARY, WARNING, made_up_run, stepped
from rich.console import Console

from phinetune.base import events
from phinetune.cli.run_view import Declined, RunView


def consoles(width: int, *, terminal: bool = False, encoding: str = "utf-8") -> tuple[Console, Console]:
    return tuple(  # type: ignore[return-value]
        Console(
            file=io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True),
            width=width,
            force_terminal=terminal,
            no_color=not terminal,
            highlight=False,
            markup=False,
        )
        for _ in range(2)
    )


def text_of(console: Console) -> str:
    console.file.flush()
    raw = console.file.buffer.getvalue()  # type: ignore[attr-defined]
    return str(raw.decode(console.file.encoding))


def shown(width: int = 100, **options: Any) -> tuple[str, str]:
    progress, result = consoles(width, **options)
    RunView(progress, result).follow(made_up_run())
    return text_of(progress), text_of(result)


def test_the_summary_is_returned() -> None:
    progress, result = consoles(100)
    assert RunView(progress, result).follow(made_up_run()) == SUMMARY


def test_the_plan_shows_every_number() -> None:
    progress, _ = shown()
    progress = " ".join(progress.split())
    for part in (
        "2,000 examples",
        "250 packed sequences",
        "128,000 tokens",
        "50,000 of them trained",
        "3 left out",
        "40 steps",
        "10% of the steps",
        "the states below block 28, 196.0 MB in cache/states: computed once before the first step",
        "the first 60 tokens of rows are the same: computed once a batch, 48% fewer tokens",
        "about 1 min 35 s, 1.2 GB of memory",
    ):
        assert part in progress


def test_a_warning_is_shown_once_with_its_proposal() -> None:
    progress, _ = shown()
    assert progress.count(WARNING) == 1
    assert "propose  num_warmup_steps: 4" in progress


def test_result_goes_to_one_console_and_progress_to_the_other() -> None:
    progress, result = shown()
    assert "exact match" in result
    assert "exact match" not in progress
    assert "step 40/40" in progress
    assert "step 40/40" not in result


def test_differences_are_judged_by_their_interval() -> None:
    _, result = shown()
    rows = {line.strip()[:11].strip(): line for line in result.splitlines()}
    assert "+91.5 [+87.0, +95.0]" in rows["exact match"]
    assert rows["exact match"].rstrip().endswith("better")
    assert rows["loss"[:11]].rstrip().endswith("better")
    assert rows["field order"].rstrip().endswith("no clear change")


def test_answers_are_shown_word_for_word() -> None:
    _, result = shown()
    assert ANSWERS[0]["base"] in result


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("terminal", [False, True])
def test_no_line_is_wider_than_the_terminal(width: int, terminal: bool) -> None:
    for text in shown(width, terminal=terminal):
        plain = Console(file=io.StringIO(), width=500)
        for line in text.replace("\r", "\n").splitlines():
            from rich.text import Text

            assert plain.measure(Text.from_ansi(line)).maximum <= width, line


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437"])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_without_unicode_gets_plain_characters(encoding: str, terminal: bool) -> None:
    _, result = shown(80, encoding=encoding, terminal=terminal)
    assert "exact match" in result


def test_plain_progress_is_brief() -> None:
    progress, _ = shown()
    lines = [line for line in progress.splitlines() if line.startswith("step ") and "/40" in line]
    assert 10 <= len(lines) <= 12
    assert lines[0].startswith("step 1/40")
    assert lines[-1].startswith("step 40/40")
    assert "3,000 tok/s" in lines[-1]


def test_slow_steps_still_give_signs_of_life() -> None:
    progress, result = consoles(100)
    view = RunView(progress, result)
    for step in range(1, 5):
        view.show(stepped(step, num_steps=1000, time=1000.0 + 31.0 * step))
    assert text_of(progress).count("/1000") == 4


def test_saying_no_to_the_plan_stops_the_run() -> None:
    progress, result = consoles(100)
    run = made_up_run()
    with pytest.raises(Declined):
        RunView(progress, result, confirm=lambda plan: plan != PLAN).follow(run)
    assert "step 1/40" not in text_of(progress)


def test_without_a_result_console_nothing_but_progress_is_drawn() -> None:
    progress, _ = consoles(100)
    assert RunView(progress, None).follow(made_up_run()) == SUMMARY
    assert "exact match" not in text_of(progress)


def test_the_view_knows_what_was_kept() -> None:
    progress, result = consoles(100)
    view = RunView(progress, result)
    view.show(stepped(7))
    view.show(events.Saved(step=7, path="somewhere"))
    assert (view.last_step, view.saved_path) == (7, "somewhere")
