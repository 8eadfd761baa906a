"""Events go to a file line by line; what a crash cut off is not read as an event."""

from __future__ import annotations

import math

import pytest

from phinetune.base.events import Evaluated, EventLog, Planned, Saved, Stage, read_events


def logged(path, *events):
    log = EventLog(path)
    for event in events:
        log.append(event)
    log.close()
    return path


def test_events_come_back_in_order_with_their_kind(tmp_path):
    path = logged(tmp_path / "events.jsonl", Stage(name="read", detail="Übung"), Saved(step=3, path="x"))
    first, second = read_events(path)
    assert first["event"] == "Stage"
    assert first["detail"] == "Übung"
    assert second["event"] == "Saved"
    assert second["step"] == 3
    assert second["time"] >= first["time"] > 1.7e9


def test_a_line_is_on_disk_as_soon_as_it_is_appended(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append(Stage(name="read"))
    assert [event["name"] for event in read_events(tmp_path / "events.jsonl")] == ["read"]
    log.close()


@pytest.mark.parametrize("num_bytes_lost", [1, 5, 20])
def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path, num_bytes_lost):
    path = logged(tmp_path / "events.jsonl", Stage(name="read"), Stage(name="train"))
    path.write_bytes(path.read_bytes()[:-num_bytes_lost])
    assert [event["name"] for event in read_events(path)] == ["read"]


def test_a_log_opened_after_a_crash_does_not_join_the_cut_line(tmp_path):
    path = logged(tmp_path / "events.jsonl", Stage(name="read"), Stage(name="train"))
    path.write_bytes(path.read_bytes()[:-7])
    logged(path, Stage(name="again"))
    assert [event["name"] for event in read_events(path)] == ["read", "again"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(tmp_path, value):
    evaluated = Evaluated(
        step=1, epoch=0.5, loss=value, token_accuracy=0.5, num_trained_tokens=3, is_best=False, seconds=0.1
    )
    nested = Planned(plan={"list": [value, 1.0], "tuple": (2, value), 7: {"deep": value}})
    one, two = read_events(logged(tmp_path / "events.jsonl", evaluated, nested))
    assert one["loss"] is None
    assert one["epoch"] == 0.5
    assert two["plan"] == {"list": [None, 1.0], "tuple": [2, None], "7": {"deep": None}}
