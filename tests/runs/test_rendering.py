"""Tokenised data is made once, made anew when anything has changed, and never trusted unseen."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from tiny_project import WORDS, write_chats

from phinetune.base.errors import DataError
from phinetune.base.files import MANIFEST
from phinetune.data.reading import load_examples
from phinetune.models.catalog import demo_folder
from phinetune.runs import rendering
from phinetune.runs.prepare import prepare
from phinetune.runs.rendering import CACHE, NUM_KEPT, cache_bytes, rendered_file
from phinetune.text.render import Renderer, joined, load_renderer
from phinetune.text.row_files import ROWS_FILE, TOKENS_FILE
from phinetune.training.settings import TrainingSettings


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(demo_folder() / name, folder / name)
    return folder


@pytest.fixture
def data(tmp_path):
    return write_chats(tmp_path / "train.json", WORDS)


def rows_of(path, project, model, **settings):
    return rendered_file(path, project, load_renderer(model), model, TrainingSettings(**settings))


def entries(project):
    return sorted(path.parent for path in (project / CACHE).glob(f"*/{MANIFEST}"))


def ids(rows):
    return [row.ids.tolist() for row in rows]


def test_rows_are_those_of_the_renderer(data, model, tmp_path):
    found = rows_of(data, tmp_path, model)
    expected = load_renderer(model).examples(load_examples(data))
    for row, other in zip(found.rows, expected, strict=True):
        assert row.ids.tolist() == other.ids.tolist()
        assert row.trained.tolist() == other.trained.tolist()
        assert row.source == other.source
    assert found.notes == ()
    assert cache_bytes(tmp_path) > 4 * sum(found.rows.num_tokens)


def test_groups_of_any_size_give_the_same_rows(data, model, tmp_path, monkeypatch):
    whole = ids(rows_of(data, tmp_path / "a", model).rows)
    monkeypatch.setattr(rendering, "_GROUP_ROWS", 3)
    assert ids(rows_of(data, tmp_path / "b", model).rows) == whole
    monkeypatch.setattr(rendering, "_GROUP_CHARACTERS", 1)
    assert ids(rows_of(data, tmp_path / "c", model).rows) == whole


def test_a_second_time_nothing_is_read(data, model, tmp_path, monkeypatch):
    first = ids(rows_of(data, tmp_path, model).rows)
    monkeypatch.setattr(rendering, "sound_examples", None)
    assert ids(rows_of(data, tmp_path, model).rows) == first
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize(
    "change",
    ["data", "suffix", "tokenizer", "template", "config", "system_prompt", "loss_on", "code"],
)
def test_whatever_rows_depend_on_makes_them_anew(change, data, model, tmp_path, monkeypatch):
    rows_of(data, tmp_path, model)
    settings = {}
    if change == "data":
        write_chats(data, WORDS[:-1])
    elif change == "suffix":
        data = data.rename(data.with_suffix(".jsonl"))
    elif change == "tokenizer":
        with (model / "tokenizer.json").open("a") as file:
            file.write("\n")
    elif change == "template":
        (model / "chat_template.jinja").write_text("{{ messages }}")
    elif change == "config":
        (model / "generation_config.json").write_text("{}")
    elif change == "code":
        monkeypatch.setattr(rendering, "_code_sha256", lambda: "another")
    else:
        settings = {"system_prompt": "Be brief."} if change == "system_prompt" else {"loss_on": "all"}
    renderer = load_renderer(demo_folder())  # the files themselves need not make sense here
    rendered_file(data, tmp_path, renderer, model, TrainingSettings(**settings))
    assert len(entries(tmp_path)) == 2


def test_what_rows_do_not_depend_on_keeps_them(data, model, tmp_path):
    rows_of(data, tmp_path, model)
    rows_of(data, tmp_path, model, finetune_train_seqlen=64, overlong="drop", seed=7, lora_r=4)
    assert len(entries(tmp_path)) == 1


def flip_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [TOKENS_FILE, ROWS_FILE, MANIFEST, "key.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_entry_is_told_and_made_anew(name, damage, data, model, tmp_path):
    good = ids(rows_of(data, tmp_path, model).rows)
    (entry,) = entries(tmp_path)
    if damage == "flipped":
        flip_last_bit(entry / name)
    elif damage == "cut":
        os.truncate(entry / name, 5)
    else:
        (entry / name).unlink()
    again = rows_of(data, tmp_path, model)
    assert ids(again.rows) == good
    assert str(entry) in again.notes[0]
    assert rows_of(data, tmp_path, model).notes == ()


def test_an_entry_of_other_data_under_this_name_is_not_used(data, model, tmp_path):
    rows_of(data, tmp_path, model)
    (entry,) = entries(tmp_path)
    other = write_chats(tmp_path / "other.json", WORDS[:2])
    rows_of(other, tmp_path, model)
    (foreign,) = set(entries(tmp_path)) - {entry}
    shutil.rmtree(entry)
    shutil.copytree(foreign, entry)
    again = rows_of(data, tmp_path, model)
    assert "other data" in again.notes[0]
    assert len(again.rows) == len(WORDS)


def test_faults_are_all_told_and_nothing_is_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "_GROUP_ROWS", 2)
    real = Renderer.examples

    def examples(self, group, **settings):
        bad = [example for example in group if getattr(example, "text", "") == "unwritable"]
        if bad:
            raise joined([DataError("no", where=str(example.source)) for example in bad])
        return real(self, group, **settings)

    monkeypatch.setattr(Renderer, "examples", examples)
    path = write_chats(tmp_path / "train.json", ["fine"] * 5)
    lines = path.read_text().splitlines()
    control = json.dumps({"text": "unwritable"})
    path.write_text("\n".join([control, *lines[:3], control, lines[3]]))
    with pytest.raises(DataError, match="2 rows cannot be trained on") as caught:
        rows_of(path, tmp_path, model)
    assert [error.where for error in caught.value.findings] == [f"{path}:1", f"{path}:5"]
    path.write_text("\n".join([control, *lines, "[]", "{}"]))
    with pytest.raises(DataError, match="2 faults"):
        rows_of(path, tmp_path, model)
    assert [path.name for path in (tmp_path / CACHE).iterdir() if path.is_dir()] == []


def test_a_file_that_changes_meanwhile_is_refused(data, model, tmp_path, monkeypatch):
    real = rendering.sound_examples

    def read_and_append(path):
        yield from real(path)
        with path.open("a") as file:
            file.write("\n")

    monkeypatch.setattr(rendering, "sound_examples", read_and_append)
    with pytest.raises(DataError, match="changed while it was read"):
        rows_of(data, tmp_path, model)
    assert not entries(tmp_path)


def test_only_the_entries_used_last_are_kept(data, model, tmp_path):
    rows_of(data, tmp_path, model)
    (first,) = entries(tmp_path)
    for number in range(NUM_KEPT):
        for age, entry in enumerate(entries(tmp_path)):
            os.utime(entry, (1000 + age, 1000 + age))
        rows_of(data, tmp_path, model)  # used again, so the newest
        rows_of(data, tmp_path, model, system_prompt=f"Number {number}.")
    assert len(entries(tmp_path)) == NUM_KEPT
    assert first in entries(tmp_path)


def test_what_a_killed_process_left_is_cleared(data, model, tmp_path):
    (tmp_path / CACHE / ".tmp-half-12345678").mkdir(parents=True)
    rows_of(data, tmp_path, model)
    assert not list((tmp_path / CACHE).glob(".tmp-*"))


def test_a_place_that_cannot_be_written_to_gets_rows_all_the_same(data, model, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / CACHE).write_text("in the way")
    found = rows_of(data, tmp_path / "project", model)
    assert ids(found.rows) == ids(rows_of(data, tmp_path, model).rows)
    assert list(temporary.iterdir())
    del found
    assert not list(temporary.iterdir())


def _render(path, project, model):
    rows_of(path, project, model)


def test_processes_that_begin_together_make_one_entry(data, model, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_render, args=(data, tmp_path, model)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(entries(tmp_path)) == 1


def test_a_plan_is_the_same_with_and_without_the_cache(new_project):
    project = new_project(finetune_train_seqlen=20, overlong="cut")
    settings = TrainingSettings(
        model=str(demo_folder()), finetune_dataset="dataset", finetune_train_seqlen=20, overlong="cut"
    )
    first, second = prepare(project, settings), prepare(project, settings)
    assert first.plan == second.plan
    assert first.test_examples == second.test_examples == load_examples(Path(first.files[1].path))
    assert [place for place, _ in first.test_pieces] == [0, 1, 2]


def peak_bytes(project, num_rows, settings):
    """The most that Python held while a project's data was prepared, from its file and then from its rows."""
    (project / "dataset").mkdir(parents=True)
    words = [f"word{number} " * 20 for number in range(num_rows)]
    write_chats(project / "dataset" / "train.json", words)
    write_chats(project / "dataset" / "test.json", WORDS)
    del words
    peaks = []
    for _ in range(2):
        gc.collect()
        tracemalloc.start()
        prepared = prepare(project, settings)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert prepared.plan.train.num_used == num_rows
    return peaks


def test_a_row_more_costs_no_more_memory_than_its_place_in_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "_GROUP_ROWS", 128)
    settings = TrainingSettings(
        model="demo", finetune_dataset="dataset", finetune_train_nsamples=10**6, finetune_train_seqlen=512
    )
    few = peak_bytes(tmp_path / "few", 500, settings)
    many = peak_bytes(tmp_path / "many", 2500, settings)
    # As objects a row of these is several kilobytes: two texts, two arrays, what holds them.
    assert [(b - a) / 2000 < 150 for a, b in zip(few, many, strict=True)] == [True, True], (few, many)
