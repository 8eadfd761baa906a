"""Names and places of runs."""

from __future__ import annotations

import pytest

from phinetune.base.errors import UserError
from phinetune.base.events import EventLog
from phinetune.runs.folder import RunFolder, checked_run_path, create_run, find_run, new_run_name


def test_a_new_name_is_valid_and_sorts_by_time(tmp_path):
    names = {new_run_name() for _ in range(50)}
    assert len(names) > 40
    for name in names:
        assert checked_run_path(tmp_path, name) == tmp_path / "runs" / name
        assert len(name) == len("20261120-142233-k3f")
    assert checked_run_path(tmp_path, None).parent == tmp_path / "runs"


def test_a_run_is_found_from_its_project_its_adapter_and_itself(tmp_path):
    old = create_run(tmp_path / "runs" / "20260101-000000-aaa", {"status": "running"})
    new = create_run(tmp_path / "runs" / "20260102-000000-aaa", {"status": "running"})
    (tmp_path / "runs" / "20260103-000000-not-a-run").mkdir()
    old.adapter.mkdir()
    assert find_run(tmp_path) == RunFolder(new.path.resolve())
    assert find_run(old.path) == find_run(old.adapter) == RunFolder(old.path.resolve())


def test_where_no_run_is_it_is_said(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        find_run(tmp_path)


def test_a_run_is_running_only_while_somebody_writes_it(tmp_path):
    run = create_run(tmp_path / "r", {"status": "running"})
    assert run.status() == "interrupted"
    log = EventLog(run.events)
    assert run.status() == "running"
    with pytest.raises(UserError, match="written by another process"):
        EventLog(run.events)
    log.close()
    assert run.status() == "interrupted"
    done = create_run(tmp_path / "done", {"status": "succeeded"})
    assert done.status() == "succeeded"
