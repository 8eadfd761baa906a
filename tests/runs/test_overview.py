"""What is known of a run at any time, how runs differ, and following one that another process writes."""

from __future__ import annotations

import json
import math

import pytest

from phinetune.base.errors import UserError
from phinetune.base.events import Evaluated, EventLog, Finished, Noted, Stepped, event_of, read_events
from phinetune.runs import watching
from phinetune.runs.folder import RunFolder, create_run
from phinetune.runs.overview import overview, side_by_side
from phinetune.runs.train_run import train_run
from phinetune.runs.watching import watch


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """Two finished runs, one of them with another rate, and one that was cut off after three steps."""
    from tiny_project import project_maker

    project = project_maker(models, tmp_path_factory.mktemp("overview"))(compare_nsamples=0)
    list(train_run(project, run_name="one"))
    list(train_run(project, run_name="two", overrides={"learning_rate": "1e-3", "varied_seqlen": "true"}))
    cut = train_run(project, run_name="cut", from_adapter=project / "runs" / "one")
    steps = 0
    for event in cut:
        steps += isinstance(event, Stepped)
        if steps == 3:
            break
    cut.close()
    return {name: RunFolder(project / "runs" / name) for name in ("one", "two", "cut")}


def test_an_overview_says_what_the_run_itself_says(runs):
    found, summary = overview(runs["one"]), json.loads(runs["one"].summary.read_text())
    assert (found.run_id, found.status, found.goes_on_from) == ("one", "succeeded", "")
    assert (found.num_steps_done, found.num_steps, found.best_step) == (4, 4, summary["best_step"])
    assert found.best_loss == pytest.approx(summary["evaluation"]["adapter"]["loss"], rel=1e-5)
    assert found.first_loss == pytest.approx(summary["evaluation"]["base"]["loss"], rel=1e-5)
    assert 0 < found.seconds < 300


def test_an_unfinished_run_has_an_overview_too(runs):
    found = overview(runs["cut"])
    assert (found.status, found.num_steps_done, found.num_steps) == ("interrupted", 3, 4)
    assert found.goes_on_from == "one"


def test_only_what_differs_is_put_side_by_side(runs):
    found = side_by_side([runs["one"], runs["two"]])
    assert {row.name: row.values for row in found.settings} == {
        "learning_rate": (1e-2, 1e-3), "varied_seqlen": (False, True),
    }  # fmt: skip
    results = {row.name: row.values for row in found.results}
    for place, name in enumerate(("one", "two")):
        summary = json.loads(runs[name].summary.read_text())
        assert results["loss"][place] == summary["evaluation"]["adapter"]["loss"]
        assert results["tokens_per_second"][place] == summary["tokens_per_second"]
    assert found.warnings == ()
    three = side_by_side(list(runs.values()))
    assert {row.name: row.values for row in three.results}["loss"][2] is None


def test_figures_of_different_test_sets_come_with_a_warning(runs, tmp_path):
    record = runs["one"].record()
    record["data"]["test"]["sha256"] = "0" * 64
    other = create_run(tmp_path / "other", record)
    found = side_by_side([runs["one"], other])
    assert [row.name for row in found.settings] == ["test data"]
    assert "different test sets" in found.warnings[0]


def test_one_run_alone_is_not_compared(runs):
    with pytest.raises(UserError, match="two runs or more"):
        side_by_side([runs["one"]])


def test_a_record_becomes_the_event_it_was(runs):
    for record in read_events(runs["one"].events):
        assert event_of(record).record() == record
    assert event_of({"event": "FromTheFuture", "time": 1.0}) is None
    assert event_of({"event": "Noted", "time": 1.0}) is None
    step = dict(next(record for record in read_events(runs["one"].events) if record["event"] == "Stepped"))
    assert math.isnan(event_of({**step, "loss": None}).loss)


def test_watching_shows_what_was_and_what_comes_until_the_writer_ends(tmp_path):
    run = RunFolder(tmp_path)
    log = EventLog(run.events)
    log.append(Noted(what="before"))
    waits = []

    def wait():
        """Another process, between two looks: writes a line in two halves, then ends."""
        waits.append(1)
        match len(waits):
            case 1:
                log._file.write(b'{"event": "Noted", "time": 1.0, ')
            case 2:
                log._file.write(b'"what": "in halves"}\n')
            case 3:
                log.append(Noted(what="last"))
                log.close()

    assert [event.what for event in watch(run, wait)] == ["before", "in halves", "last"]
    assert len(waits) == 3


def test_what_a_writer_says_last_is_not_lost(tmp_path, monkeypatch):
    """It may write and end just while it is asked whether it still lives."""
    run = RunFolder(tmp_path)
    log = EventLog(run.events)
    log.append(Noted(what="first"))

    def ends_meanwhile(path):
        log.append(Noted(what="last"))
        log.close()
        return False

    monkeypatch.setattr(watching, "is_being_written", ends_meanwhile)
    assert [event.what for event in watch(run)] == ["first", "last"]


def test_a_run_that_is_over_is_shown_without_waiting(runs):
    def wait():
        raise AssertionError("nobody writes this run")

    events = list(watch(runs["one"], wait))
    assert isinstance(events[-1], Finished)
    assert [event.step for event in events if isinstance(event, Evaluated)] == [0, 1, 2, 3, 4]
    assert list(watch(RunFolder(runs["one"].path / "nothing"), wait)) == []
