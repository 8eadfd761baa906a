"""A chat that classifies: answers are those of the training rows, and macro-F1 is measured over them."""

from __future__ import annotations

import json

import pytest

import phinetune
from phinetune.base.errors import SettingsError
from phinetune.base.events import Compared, Noted
from phinetune.runs.train_run import train_run


@pytest.fixture(autouse=True)
def _without_the_forecast(monkeypatch):
    monkeypatch.setattr("phinetune.training.forecast._seconds_per_token", lambda *args: (1e-4, 1e-4))


def write_intents(folder):
    """Chats whose answer is one of three words of the question."""
    folder.mkdir()
    rows = []
    for number in range(18):
        colour = ("blue", "green", "red")[number % 3]
        question = f"{colour} {('cup', 'two cups', 'cups, please')[number // 6]}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": colour}]
        rows.append(json.dumps({"messages": turns}))
    for part in ("train", "test"):
        (folder / f"{part}.json").write_text("\n".join(rows) + "\n")


CHANGES = {
    "finetune_dataset": "intents", "constrain_answers": "training", "compare_nsamples": 18,
    "compare_max_new_tokens": None, "num_training_steps": 24, "eval_steps": 12, "save_steps": 12,
    "finetune_train_batch_size": 2, "learning_rate": 2e-2,
}  # fmt: skip


def test_both_sides_choose_from_the_answers_of_training(new_project):
    project = new_project(**CHANGES)
    write_intents(project / "intents")
    events = list(train_run(project, run_name="r"))
    (compared,) = [event for event in events if isinstance(event, Compared)]
    for answer in compared.answers:
        assert {answer["base"], answer["adapter"]} <= {"blue", "green", "red"}
    notes = [event.what for event in events if isinstance(event, Noted)]
    assert "both sides had to answer one of 3 texts" in notes
    evaluation = compared.evaluation
    assert evaluation["adapter"]["exact_match"] > evaluation["base"]["exact_match"]
    for side in ("base", "adapter"):
        assert 0 <= evaluation[side]["macro_f1"] <= 1
    assert evaluation["difference"]["macro_f1"]["value"] == pytest.approx(
        evaluation["adapter"]["macro_f1"] - evaluation["base"]["macro_f1"]
    )
    run = project / "runs" / "r"
    assert phinetune.evaluate(run).evaluation() == evaluation
    again = phinetune.evaluate(run, project / "intents" / "test.json")
    assert again.adapter["macro_f1"] == pytest.approx(evaluation["adapter"]["macro_f1"])


def test_answers_that_cannot_be_chosen_from_are_refused(new_project):
    project = new_project(**{**CHANGES, "compare_max_new_tokens": 2})
    write_intents(project / "intents")
    with pytest.raises(SettingsError, match="does not fit compare_max_new_tokens"):
        list(train_run(project, run_name="r", overrides={"compare_max_new_tokens": "1"}))
    rows = [json.loads(line) for line in (project / "intents" / "train.json").read_text().splitlines()]
    for row in rows:
        row["messages"][1]["content"] = "blue"
    (project / "intents" / "train.json").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SettingsError, match="cannot be constrained") as caught:
        list(train_run(project, run_name="again"))
    assert "1 different answers" in caught.value.why
