"""A checkpoint brings the whole state back bit for bit; one that is damaged or foreign is never picked."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import random
import shutil
from typing import get_args

import pytest
import torch
from safetensors import SafetensorError
from tiny_training import tiny_training

from phinetune.base.errors import SpaceError, UserError
from phinetune.base.events import SaveDue, Stepped
from phinetune.base.files import manifest_fault
from phinetune.lora import tensor_file
from phinetune.training import optimizers
from phinetune.training.checkpoint import (
    Origin,
    checkpoint_bytes,
    load_checkpoint,
    newest_valid,
    prune,
    save_checkpoint,
)
from phinetune.training.loop import train
from phinetune.training.settings import OptimizerName
from phinetune.training.state import Counters

ORIGIN = Origin(settings_sha256="s", base_sha256="b", train_sha256="t", test_sha256="u")


def save(folder, state, origin=ORIGIN):
    save_checkpoint(folder, state, origin, base_name="tiny", metadata={}, versions={"torch": "1"})
    return folder


def trained_for(num_steps, **changes):
    """A training stopped right after a step; closing its events leaves the state as it is."""
    training = tiny_training(**{"varied_seqlen": True, "epochs": 2.0, **changes})
    events = run(training)
    for event in events:
        if isinstance(event, Stepped) and event.step == num_steps:
            break
    events.close()
    return training


def run(training):
    return train(
        training.base, training.state, training.settings, training.plan, training.train_rows,
        training.test_rows,
    )  # fmt: skip


def optimizer_tensors(state):
    entries = state.optimizer.state_dict()["state"].values()
    return [entry[key].clone() for entry in entries for key in sorted(entry)]


def assert_same_state(one, two):
    for name in Counters.__dataclass_fields__:
        assert getattr(one, name) == getattr(two, name), name
    weights = [(state.adapter.snapshot(), state.best_weights) for state in (one, two)]
    for first, second in zip(*weights, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = optimizer_tensors(one), optimizer_tensors(two)
    assert len(first) == len(second)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_a_saved_state_comes_back_whole(tmp_path, num_steps):
    before = trained_for(num_steps, eval_steps=2)
    folder = save(tmp_path / "step-000001", before.state)
    assert manifest_fault(folder) == ""
    after = tiny_training(varied_seqlen=True, epochs=2.0, eval_steps=2)
    assert load_checkpoint(folder, after.state) == {"torch": "1", "threads": str(torch.get_num_threads())}
    assert_same_state(before.state, after.state)
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert size_bytes <= checkpoint_bytes(before.adapter.num_parameters)


def test_a_state_before_the_first_step_can_be_saved(tmp_path):
    training = tiny_training()
    folder = save(tmp_path / "step-000000", training.state)
    after = tiny_training()
    after.adapter.reset(99)
    load_checkpoint(folder, after.state)
    assert after.state.best_loss == math.inf
    assert after.state.settled_step == -1
    assert_same_state(training.state, after.state)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_training_cut_after_any_event_ends_in_the_same_bits(tmp_path, dropout, accumulation):
    """Mid-epoch, before and after evaluations and saves: everywhere the loop gives control away."""
    changes = {
        "varied_seqlen": True, "epochs": 2.0, "lora_dropout": dropout, "eval_steps": 2, "save_steps": 2,
        "gradient_accumulation_steps": accumulation, "finetune_train_batch_size": 1,
        "early_stopping_patience": 3,
    }  # fmt: skip
    whole = tiny_training(**changes)
    events = whole.events()
    losses = {event.step: event.loss for event in events if isinstance(event, Stepped)}
    for cut in range(1, len(events), 3):
        first, second = tiny_training(**changes), tiny_training(**changes)
        generator, seen = run(first), {}
        for _, event in zip(range(cut), generator, strict=False):
            if isinstance(event, Stepped):
                seen[event.step] = event.loss
        folder = save(tmp_path / f"step-{cut:06d}", first.state)
        generator.close()
        load_checkpoint(folder, second.state)
        rest = second.events()
        seen |= {event.step: event.loss for event in rest if isinstance(event, Stepped)}
        assert seen == losses
        assert [type(event) for event in rest if not isinstance(event, SaveDue)] == [
            type(event) for event in events[cut:] if not isinstance(event, SaveDue)
        ]
        second.state.seconds = whole.state.seconds
        assert_same_state(whole.state, second.state)


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_every_optimizer_goes_on_in_the_same_bits(tmp_path, optimizer):
    changes = {"varied_seqlen": True, "epochs": 2.0, "lora_dropout": 0.2, "weight_decay": 0.1}
    whole = tiny_training(optimizer=optimizer, **changes)
    whole.events()
    for cut in (1, 5):
        first = trained_for(cut, optimizer=optimizer, **changes)
        folder = save(tmp_path / f"step-{cut:06d}", first.state)
        second = tiny_training(optimizer=optimizer, **changes)
        load_checkpoint(folder, second.state)
        second.events()
        second.state.seconds = whole.state.seconds
        assert_same_state(whole.state, second.state)
        # A guard: without what the optimizer keeps, the end is another one.
        third = tiny_training(optimizer=optimizer, **changes)
        load_checkpoint(folder, third.state)
        third.state.optimizer.state.clear()
        third.events()
        assert any(
            not torch.equal(weight, whole.adapter.snapshot()[name])
            for name, weight in third.adapter.snapshot().items()
        )


def test_groups_in_another_order_than_the_adapters_weights_come_back_right(tmp_path, monkeypatch):
    """Weights of several groups are numbered by group: matrices first, then vectors."""

    def groups(adapter, settings):
        matrices = [weight for name, weight in adapter.named_parameters() if name.endswith("B")]
        others = [weight for name, weight in adapter.named_parameters() if name.endswith("A")]
        return [{"params": matrices}, {"params": others, "weight_decay": 0.1}]

    monkeypatch.setattr(optimizers, "weight_groups", groups)
    before = trained_for(3)
    folder = save(tmp_path / "step-000003", before.state)
    after = tiny_training(varied_seqlen=True, epochs=2.0)
    load_checkpoint(folder, after.state)
    for weight, again in zip(before.adapter.parameters(), after.adapter.parameters(), strict=True):
        saved, kept = before.state.optimizer.state[weight], after.state.optimizer.state[again]
        assert saved.keys() == kept.keys()
        assert all(torch.equal(saved[key], kept[key]) for key in saved)


def three_checkpoints(folder):
    training = trained_for(2)
    for step in (2, 4, 6):
        save(folder / f"step-{step:06d}", training.state)
    return folder


def test_the_newest_whole_checkpoint_is_picked_and_others_are_named(tmp_path):
    three_checkpoints(tmp_path)
    (tmp_path / ".tmp-step-000008-abc").mkdir()
    (tmp_path / "step-8").mkdir()
    (tmp_path / "best").mkdir()
    assert newest_valid(tmp_path, ORIGIN).path == tmp_path / "step-000006"
    with (tmp_path / "step-000006" / "optimizer.safetensors").open("r+b") as file:
        file.truncate(100)
    pick = newest_valid(tmp_path, ORIGIN)
    assert pick.path == tmp_path / "step-000004"
    assert len(pick.skipped) == 1
    assert "step-000006" in pick.skipped[0]
    assert "optimizer.safetensors has 100 bytes" in pick.skipped[0][1]


def test_where_no_checkpoint_can_be_used_every_fault_is_named(tmp_path):
    three_checkpoints(tmp_path)
    for step in (2, 4, 6):
        (tmp_path / f"step-{step:06d}" / "state.json").unlink()
    with pytest.raises(UserError, match="no checkpoint of the run can be used") as caught:
        newest_valid(tmp_path, ORIGIN)
    assert caught.value.why.count("state.json is missing") == 3


def test_where_there_is_none_nothing_is_picked(tmp_path):
    assert newest_valid(tmp_path / "missing", ORIGIN).path is None


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Origin)])
def test_a_checkpoint_of_another_run_is_skipped(tmp_path, field):
    three_checkpoints(tmp_path)
    save(tmp_path / "step-000008", trained_for(1).state, dataclasses.replace(ORIGIN, **{field: "other"}))
    pick = newest_valid(tmp_path, ORIGIN)
    assert pick.path == tmp_path / "step-000006"
    assert pick.skipped == (("step-000008", f"it belongs to another run: {field} differ"),)


def test_every_changed_byte_and_every_cut_is_seen(tmp_path):
    """The long form of this is in tests/crash."""
    folder = save(tmp_path / "step-000002", trained_for(2).state)
    files = sorted(folder.iterdir())
    generator = random.Random(0)
    for trial in range(60):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        place = generator.randrange(len(whole))
        if trial % 2:
            path.write_bytes(whole[:place])
        else:
            changed = bytes([whole[place] ^ generator.randrange(1, 256)])
            path.write_bytes(whole[:place] + changed + whole[place + 1 :])
        with pytest.raises(UserError, match="can be used"):
            newest_valid(tmp_path, ORIGIN)
        path.write_bytes(whole)
    assert newest_valid(tmp_path, ORIGIN).path == folder


def test_a_blank_more_in_the_manifest_is_seen(tmp_path):
    folder = save(tmp_path / "step-000002", trained_for(1).state)
    manifest = folder / "MANIFEST.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=2))
    assert manifest_fault(folder) == "the manifest is not as it was written"


def test_pruning_keeps_whole_ones_the_best_and_nothing_older(tmp_path):
    three_checkpoints(tmp_path)
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000001")
    shutil.copytree(tmp_path / "step-000002", tmp_path / "best")
    (tmp_path / "step-000006" / "state.json").write_text("{}")
    assert prune(tmp_path, keep=2) == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"best", "step-000002", "step-000004", "step-000006"}
    assert prune(tmp_path, keep=1) == 1
    assert newest_valid(tmp_path, ORIGIN).path == tmp_path / "step-000004"


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_half(tmp_path, monkeypatch):
    state = trained_for(2).state
    save(tmp_path / "step-000002", state)
    original = tensor_file.save_file

    def full(content, path, metadata=None):
        if path.name == "optimizer.safetensors":
            raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")
        original(content, path, metadata)

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(SpaceError, match="disk is full"):
        save(tmp_path / "step-000004", state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert newest_valid(tmp_path, ORIGIN).path == tmp_path / "step-000002"
