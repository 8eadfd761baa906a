"""New rows keep their answers and are marked as synthetic; system prompts are looked at."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from planted_faults import Sentences

from phinetune.base.errors import SettingsError, UserError
from phinetune.data.changing.augmenting import augment_file, in_other_case, with_typos
from phinetune.data.system_prompts import TEMPLATES, lint_prompts


@pytest.fixture
def path(tmp_path: Path) -> Path:
    sentences = Sentences()
    rows = [sentences.row() for _ in range(40)] + [{"text": "a text"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return tmp_path / "a.jsonl"


def test_new_rows_stand_last_and_are_marked(path: Path, tmp_path: Path) -> None:
    to = tmp_path / "b.jsonl"
    counts = augment_file(
        path,
        to,
        ("typos", "case", "paraphrase"),
        share=0.5,
        seed=1,
        paraphrase=lambda text: f"In other words, {text}",
    )
    old, new = path.read_text("utf-8").splitlines(), to.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in new[: len(old)]] == [json.loads(line) for line in old]
    recipe = json.loads((tmp_path / "b.jsonl.recipe.json").read_text("utf-8"))
    assert recipe["synthetic"]["first_row"] == len(old) + 1
    assert recipe["synthetic"]["last_row"] == len(new) == len(old) + counts.total()
    assert recipe["synthetic"]["rows_by_way"] == dict(counts)
    assert min(counts.values()) > 8
    answers = {json.loads(line)["messages"][1]["content"] for line in old[:-1]}
    prompts = {json.loads(line)["messages"][0]["content"] for line in old[:-1]}
    for line in new[len(old) :]:
        prompt, answer = (message["content"] for message in json.loads(line)["messages"])
        assert answer in answers
        assert prompt not in prompts
    augment_file(path, tmp_path / "c.jsonl", ("typos", "case"), share=0.5, seed=1)
    augment_file(path, tmp_path / "d.jsonl", ("typos", "case"), share=0.5, seed=1)
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "d.jsonl").read_bytes()
    with pytest.raises(UserError, match="there already"):
        augment_file(path, to, ("typos",), share=0.5, seed=1)


def test_typos_leave_numbers_and_short_words(tmp_path: Path) -> None:
    rng = random.Random(3)
    assert all(with_typos("a1b2c3 4711 is on", rng) == "a1b2c3 4711 is on" for _ in range(20))
    changed = {with_typos("Where is my parcel 4711?", rng) for _ in range(40)}
    assert len(changed) > 10
    assert all("4711?" in text for text in changed)
    assert {in_other_case("Why?", rng) for _ in range(40)} == {"why?", "WHY?", "why", "Why"}


@pytest.mark.parametrize(
    ("ways", "share"), [(("typo",), 0.5), (("paraphrase",), 0.5), (("typos",), 0.0), (("case",), 2.0)]
)
def test_what_cannot_be_done_is_explained(
    ways: tuple[str, ...], share: float, path: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as caught:
        augment_file(path, tmp_path / "b.jsonl", ways, share=share, seed=1)
    assert caught.value.do


def test_our_own_templates_need_no_advice() -> None:
    assert len({template.task for template in TEMPLATES}) == len(TEMPLATES) >= 5
    for template in TEMPLATES:
        assert lint_prompts(template.training, template.inference) == []
        assert len(template.inference) > len(template.training)


@pytest.mark.parametrize(
    ("training", "inference", "rule"),
    [
        ("Be kind. Be short. Be clear.", "", "long_training_prompt"),
        ("word " * 70, "", "long_training_prompt"),
        ("Answer for {name}.", "", "blank_left"),
        ("", "Answer <your text>.", "blank_left"),
        ("Be kind.<|end|>", "", "control_text"),
        ("You are ChatGPT.", "", "other_program"),
        ("Forward to ann@example.org.", "", "private_data"),
        ("Answer in plain words, please.", "Be short.", "shorter_inference"),
        ("Answer in plain words.", "List every product as JSON and nothing else.", "unrelated_inference"),
    ],
)
def test_a_prompt_that_goes_wrong_is_advised(training: str, inference: str, rule: str) -> None:
    assert [advice.rule for advice in lint_prompts(training, inference)] == [rule]
