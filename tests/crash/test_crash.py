"""kill -9 at random moments, and bytes changed at random: nothing torn is picked, nothing is lost.

The short forms run with every test run; `make test-crash` runs the long ones and prints the figures.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainee import ORIGIN, state_of

from phinetune.base.errors import UserError
from phinetune.base.files import clear_leftovers
from phinetune.reports.history import read_history
from phinetune.runs.folder import RunFolder
from phinetune.training.checkpoint import load_checkpoint, newest_valid, save_checkpoint

SIZES = (20_000, 150_000)  # floats per tensor: checkpoints of 1 and 7 MB with two tensors and their moments


def picked(folder: Path, log: Path, size: int) -> int:
    """The step of the newest checkpoint; every number in it must be that step, and none told is lost."""
    told = [int(line) for line in log.read_text().split()] if log.exists() else []
    pick = newest_valid(folder, ORIGIN)
    if pick.path is None:
        assert not told
        return 0
    assert pick.skipped == (), "a kill left a torn folder under a checkpoint's name"
    state = state_of(0, size)
    load_checkpoint(pick.path, state)
    tensors = [*state.adapter.parameters()]
    tensors += [value for entry in state.optimizer.state.values() for value in entry.values()]
    assert all(bool((tensor == state.step).all()) for tensor in tensors)
    assert pick.path.name == f"step-{state.step:06d}"
    assert state.step >= max(told, default=0)
    return state.step


def kill_savers(trainee: Any, moments: random.Random, root: Path, num_kills: int) -> tuple[int, int]:
    """Kill a process that saves back to back; returns how many left something half done, and the steps."""
    num_inside = num_steps = 0
    for size in SIZES:
        folder, step = root / str(size), 0
        folder.mkdir()
        for _ in range(num_kills // len(SIZES)):
            job = {
                "kind": "save", "folder": str(folder), "log": str(folder / "log"), "step": step, "size": size,
            }  # fmt: skip
            code, _ = trainee.run(job, kill_after_s=moments.uniform(0, 0.25))
            assert code == -9
            step = picked(folder, folder / "log", size)
            num_inside += bool(clear_leftovers(folder))
        num_steps += step
    return num_inside, num_steps


def outcome(project: Path, name: str) -> tuple[dict[str, torch.Tensor], list[tuple[object, ...]]]:
    run = RunFolder(project / "runs" / name)
    assert run.status() == "succeeded"
    tensors = {
        f"{path.name}/{file.name}/{key}": tensor
        for path in (run.adapter, run.best, run.checkpoint(8))
        for file in path.glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }
    history = read_history(run.events)
    course: list[tuple[object, ...]] = [(step.step, step.loss, step.grad_norm) for step in history.steps]
    return tensors, course + [(entry.step, entry.loss) for entry in history.evaluations]


def kill_trainings(
    trainee: Any, moments: random.Random, project: Path, num_trials: int
) -> tuple[int, dict[int, int]]:
    """Kill whole runs up to three times each, and resume; returns the kills, and where runs went on from."""
    for name in ("whole", "again"):  # the second one tells how long a run takes
        code, seconds = trainee.run({"kind": "train", "project": str(project), "run": name, "resume": False})
        assert code == 0
    tensors, course = outcome(project, "whole")
    assert outcome(project, "again")[1] == course
    assert len(course) > 8
    num_kills = num_killed = 0
    places: dict[int, int] = {}
    for trial in range(3 * num_trials):  # a run that ends before its first kill does not count
        if num_killed == num_trials:
            break
        name, was_killed = f"killed-{trial}", False
        for kills_left in range(1 + trial % 3, -1, -1):
            is_there = (project / "runs" / name / "run.json").exists()
            job = {"kind": "train", "project": str(project), "run": name, "resume": is_there}
            moment = moments.uniform(0.1, 0.95) * seconds if kills_left else None
            code, took = trainee.run(job, kill_after_s=moment)
            num_kills += code == -9
            assert code in ((0, -9) if kills_left else (0,))
            if code == 0 and not was_killed:
                seconds = took  # the machine is faster than before
                break
            if code == -9:
                was_killed = True
                steps = (project / "runs" / name).glob("checkpoints/step-*")
                last = max((int(path.name.removeprefix("step-")) for path in steps), default=0)
                places[last] = places.get(last, 0) + 1
        num_killed += was_killed
        found, found_course = outcome(project, name)
        different = [key for key in tensors if not torch.equal(found[key], tensors[key])]
        assert found.keys() == tensors.keys()
        assert found_course == course, name
        assert different == [], name
    assert num_killed == num_trials
    return num_kills, places


def damage(moments: random.Random, folder: Path, num_changes: int) -> int:
    """Change or cut a file of the newest of two checkpoints; returns how many changes were seen."""
    for step in (2, 4):
        save_checkpoint(
            folder / f"step-{step:06d}",
            state_of(step, 2000),
            ORIGIN,
            base_name="none",
            metadata={},
            versions={},
        )
    newest = folder / "step-000004"
    files = sorted(newest.iterdir())
    num_seen = 0
    for trial in range(num_changes):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        place = moments.randrange(len(whole))
        changed = bytes([whole[place] ^ moments.randrange(1, 256)]) + whole[place + 1 :]
        path.write_bytes(whole[:place] + (changed if trial % 3 else b""))
        pick = newest_valid(folder, ORIGIN)
        num_seen += pick.path == folder / "step-000002" and pick.skipped[0][0] == "step-000004"
        path.write_bytes(whole)
    assert newest_valid(folder, ORIGIN).path == newest
    return num_seen


def test_a_few_kills_tear_no_checkpoint(trainee, moments, tmp_path):
    num_inside, step = kill_savers(trainee, moments, tmp_path, 12)
    assert step > 0
    assert num_inside > 0, "some kill must have come inside a save"


def test_a_few_killed_runs_end_in_the_same_bits(trainee, moments, new_project):
    num_kills, _ = kill_trainings(trainee, moments, new_project(), 2)
    assert num_kills > 0


def test_a_few_changed_bytes_are_seen(moments, tmp_path):
    assert damage(moments, tmp_path, 40) == 40


def test_a_torn_checkpoint_would_be_noticed(tmp_path):
    """A guard on the tests above: written in place, half a checkpoint is found out."""
    save_checkpoint(
        tmp_path / "step-000001", state_of(1, 2000), ORIGIN, base_name="none", metadata={}, versions={}
    )
    with (tmp_path / "step-000001" / "optimizer.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="can be used"):
        picked(tmp_path, tmp_path / "log", 2000)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200_kills_tear_no_checkpoint(trainee, moments, tmp_path):
    num_inside, step = kill_savers(trainee, moments, tmp_path, 200)
    print(f"\n200 kills, {num_inside} inside a save or a deletion, {step} checkpoints saved, 0 torn picks")
    assert num_inside > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_20_killed_runs_end_in_the_same_bits(trainee, moments, new_project, dtype):
    num_kills, places = kill_trainings(trainee, moments, new_project(dtype=dtype), 20)
    print(f"\n{dtype}: 20 runs, {num_kills} kills, all bit-equal; newest checkpoint at the kill: {places}")
    assert num_kills >= 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_500_changed_bytes_and_cuts_are_seen(moments, tmp_path):
    num_seen = damage(moments, tmp_path, 500)
    print(f"\n500 single-byte changes and cuts: {num_seen} seen")
    assert num_seen == 500
