"""A classification from labelled rows to a proven adapter that PEFT and transformers read alike."""

from __future__ import annotations

import json

import pytest
import torch
from labelled_project import COLOURS, write_labelled, write_labelled_set
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

import phinetune
from phinetune.base.errors import AdapterError, DataError, SettingsError
from phinetune.base.events import Compared, Evaluated, Planned, Stepped, Warned
from phinetune.data.conversation import Message
from phinetune.evaluation.classify import predict
from phinetune.lora.forms import read_adapter, write_adapter
from phinetune.models.batch import PackedBatch
from phinetune.models.classifier import class_logits
from phinetune.models.merged import merge
from phinetune.runs.folder import RunFolder
from phinetune.runs.train_run import train_run
from phinetune.text.labelled import labelled, read_ids

CHANGES = {
    "task": "classification", "finetune_dataset": "labelled", "num_training_steps": 30, "eval_steps": 10,
    "save_steps": 10, "finetune_train_seqlen": 32, "finetune_train_batch_size": 2, "learning_rate": 2e-2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _without_the_forecast(monkeypatch):
    monkeypatch.setattr("phinetune.training.forecast._seconds_per_token", lambda *args: (1e-4, 1e-4))


@pytest.fixture
def project(new_project):
    made = new_project(**CHANGES)
    write_labelled_set(made / "labelled")
    return made


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def run_of(project, name="r"):
    return RunFolder(project / "runs" / name)


@pytest.mark.parametrize("as_chats", [False, True])
def test_a_classifier_learns_and_is_proven_against_the_most_frequent_class(new_project, as_chats):
    project = new_project(**CHANGES)
    write_labelled_set(project / "labelled", as_chats=as_chats)
    events = list(train_run(project, run_name="r"))
    summary = json.loads(run_of(project).summary.read_text())
    evaluation = summary["evaluation"]
    assert evaluation["base"]["accuracy"] == pytest.approx(1 / 3)
    assert evaluation["adapter"]["accuracy"] == 1
    assert evaluation["adapter"]["macro_f1"] == 1
    assert evaluation["base"]["macro_f1"] == pytest.approx((2 / 4) / 3)
    assert evaluation["difference"]["accuracy"]["low"] > 0
    assert evaluation["difference"]["macro_f1"]["low"] > 0
    assert evaluation["adapter"]["loss"] < evaluation["base"]["loss"] == pytest.approx(1.0986, abs=1e-3)
    assert summary["adapter"]["classes"] == list(COLOURS)
    plan = of(Planned, events)[0].plan
    assert plan["classes"] == list(COLOURS)
    assert {row["target"] for row in plan["coverage"]} >= {"score", "qkv_proj"}
    assert plan["train"]["num_trained_tokens"] == 18  # one class each
    assert of(Evaluated, events)[-1].token_accuracy == 1
    for answer in of(Compared, events)[0].answers:
        assert answer["adapter"] == answer["reference"] in answer["prompt"]
    assert phinetune.evaluate(run_of(project).path).evaluation() == evaluation


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_and_transformers_read_the_adapter_with_equal_logits(project, models):
    list(train_run(project, run_name="r"))
    run = run_of(project)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    classifier = phinetune.load_classifier(run.path, dtype="float32", device="cpu")
    texts = ["red two cups", "green one", "blue five"]
    theirs_model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(models[0], num_labels=3, dtype=torch.float32),
        run.adapter,
    ).eval()
    rows = [read_ids(classifier.renderer, example(text)) for text in texts]
    batch = PackedBatch.lay([labelled(ids, example(text), 0) for ids, text in zip(rows, texts, strict=True)])
    with torch.no_grad():
        ours = class_logits(classifier.base, batch)
        theirs = torch.cat([theirs_model(input_ids=torch.tensor([ids])).logits for ids in rows])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [found.label for found in classifier.classify(texts)] == ["red", "green", "blue"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_classifier_that_peft_wrote_answers_with_equal_logits(project, models, tmp_path):
    list(train_run(project, run_name="r"))  # only for its base and its labels
    theirs = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(models[0], num_labels=3, dtype=torch.float32),
        LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["qkv_proj"], init_lora_weights=False),
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "score"]  # though this model has no `classifier`
    assert read_adapter(tmp_path / "theirs", takes_whole=True).whole.keys() == {"score.weight"}
    classifier = phinetune.load_classifier(tmp_path / "theirs", device="cpu", dtype="float32")
    rows = [read_ids(classifier.renderer, example(text)) for text in ("red two cups", "green one")]
    batch = PackedBatch.lay([labelled(ids, example("x"), 0) for ids in rows])
    with torch.no_grad():
        ours = class_logits(classifier.base, batch)
        expected = torch.cat([theirs(input_ids=torch.tensor([ids])).logits for ids in rows])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert classifier.names == ("0", "1", "2")


def test_what_is_trained_whole_beside_the_head_is_saved_and_read_with_it(project):
    overrides = {"modules_to_save": "[norm]", "trainable_token_indices": "[5, 9]"}
    list(train_run(project, run_name="r", overrides=overrides))
    run = run_of(project)
    assert read_adapter(run.adapter, takes_whole=True).whole.keys() == {
        "score.weight", "model.norm.weight", "model.embed_tokens.trainable_tokens_delta"
    }  # fmt: skip
    recorded = json.loads(run.summary.read_text())["evaluation"]
    assert phinetune.evaluate(run.path).evaluation() == recorded
    assert recorded["adapter"]["accuracy"] == 1


def example(text):
    from phinetune.data.conversation import PlainText, Source

    return PlainText(text=text, source=Source(file="x", line=1))


def test_packed_rows_have_the_gradients_of_rows_one_by_one(project):
    from phinetune.models.classifier import class_loss

    list(train_run(project, run_name="r"))
    base = phinetune.load_classifier(run_of(project).path, dtype="float32", device="cpu").base
    renderer = phinetune.load_classifier(run_of(project).path, device="cpu").renderer
    rows = [
        labelled(read_ids(renderer, example(text)), example(text), number)
        for number, text in enumerate(["blue one", "green two of them", "red"])
    ]
    head = base.classifier.score.weight

    def gradient(batches):
        total = sum(class_loss(base, PackedBatch.lay(batch))[0] for batch in batches)
        return torch.autograd.grad(total, head)[0]

    torch.testing.assert_close(gradient([rows]), gradient([[row] for row in rows]), rtol=1e-4, atol=1e-5)
    apart = torch.cat([torch.tensor(predict(base, [row]).log_p_NC) for row in rows])
    torch.testing.assert_close(torch.tensor(predict(base, rows).log_p_NC), apart, rtol=1e-4, atol=1e-5)


def test_an_interrupted_classification_ends_in_the_same_bits(project):
    from safetensors.torch import load_file

    list(train_run(project, run_name="whole"))
    cut = train_run(project, run_name="cut")
    number = 15
    for event in cut:
        number -= isinstance(event, Stepped)
        if not number:
            break
    cut.close()
    list(train_run(project, run_name="cut", resume=True))
    one, two = (
        load_file(run_of(project, name).adapter / "adapter_model.safetensors") for name in ("whole", "cut")
    )
    assert one.keys() == two.keys()
    assert "base_model.model.score.weight" in one
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_chat_is_classified_as_it_was_trained(new_project):
    project = new_project(**CHANGES)
    write_labelled_set(project / "labelled", as_chats=True)
    list(train_run(project, run_name="r"))
    classifier = phinetune.load_classifier(project / "runs" / "r")
    (found,) = classifier.classify([[Message(role="user", content="green six cups")]])
    assert found.label == "green"
    # A bare text is read as a user's turn, not as a text: the model saw nothing else.
    (bare,) = classifier.classify(["green six cups"])
    assert bare == found
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert found.probability == max(found.probabilities.values()) > 0.5
    assert classifier.classify([]) == []
    with pytest.raises(DataError, match="nothing to classify"):
        classifier.classify([" "])
    with pytest.raises(DataError, match="longer than the model's context"):
        classifier.classify(["word " * 500])


def test_evaluation_on_another_file_uses_the_classes_of_the_run(project, tmp_path):
    list(train_run(project, run_name="r"))
    other = write_labelled(tmp_path / "other.json", num=6)
    comparison = phinetune.evaluate(run_of(project).path, other)
    assert comparison.num_scored == 6
    assert comparison.adapter["accuracy"] == 1
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    rows[2]["label"] = "reed"
    other.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="1 rows have labels") as caught:
        phinetune.evaluate(run_of(project).path, other)
    assert "'red'" in caught.value.why


def test_balanced_weights_and_a_labels_file_change_the_order_and_the_loss(project):
    (project / "names.txt").write_text("red\ngreen\nblue\nyellow\n")
    list(
        train_run(project, run_name="r", overrides={"labels_file": "names.txt", "class_weights": "balanced"})
    )
    classifier = phinetune.load_classifier(run_of(project).path)
    assert classifier.names == ("red", "green", "blue", "yellow")
    assert classifier.classify(["blue five"])[0].label == "blue"


def test_what_a_classifier_cannot_be_is_refused_with_what_to_do(project, models, tmp_path):
    list(train_run(project, run_name="r"))
    run = run_of(project)
    with pytest.raises(AdapterError, match="is a classifier's") as caught:
        phinetune.load(run.path)
    assert "load_classifier" in caught.value.do
    weights = read_adapter(run.adapter, takes_whole=True)
    with pytest.raises(AdapterError, match="is a classifier's"):
        merge(weights, str(models[0]), tmp_path / "merged", where="r")
    with pytest.raises(AdapterError, match="is a classifier's"):
        write_adapter(weights, tmp_path / "mlx", "mlx")
    write_adapter(weights, tmp_path / "one.safetensors", "single")
    again = read_adapter(tmp_path / "one.safetensors", takes_whole=True)
    assert torch.equal(again.whole["score.weight"], weights.whole["score.weight"])
    with pytest.raises(SettingsError, match="begins with an adapter of its own"):
        list(train_run(project, from_adapter=run.adapter))


def test_a_chat_adapter_is_no_classifier(new_project):
    project = new_project()
    list(train_run(project, run_name="r"))
    with pytest.raises(AdapterError, match="no classification head"):
        phinetune.load_classifier(project / "runs" / "r")


def test_rows_that_do_not_fit_the_task_are_refused_before_the_run(new_project):
    project = new_project()
    for task, message in (("classification", "have no label"), ("text", "are chats, the task is text")):
        with pytest.raises(DataError, match=message):
            list(train_run(project, overrides={"task": task}))
    write_labelled_set(project / "labelled")
    with pytest.raises(DataError, match="are plain text, the task is chat"):
        list(train_run(project, overrides={"task": "chat", "finetune_dataset": "labelled"}))
    assert not (project / "runs").exists()


def test_settings_that_a_classification_does_not_read_are_said(project):
    events = list(train_run(project, run_name="r", overrides={"loss_on": "all"}))
    said = [warning["what"] for warning in of(Planned, events)[0].plan["warnings"]]
    assert any("loss_on: all has no effect" in what for what in said)
    assert not of(Warned, events)
