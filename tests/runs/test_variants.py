"""A run of each variant: cut off it ends in the same bits, its result answers and can be trained on."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import phinetune
from phinetune.base.errors import SettingsError
from phinetune.base.events import Evaluated, Finished, Planned, Saved, Stepped
from phinetune.reports.history import read_history
from phinetune.runs.folder import RunFolder
from phinetune.runs.train_run import train_run

COMMON = {
    "num_training_steps": 6, "varied_seqlen": True, "gradient_accumulation_steps": 2, "lora_dropout": 0.2,
    "save_steps": 2, "compare_nsamples": 0, "early_stopping_patience": 9,
}  # fmt: skip
VARIANTS = {
    "scales and blocks": {
        "use_rslora": True, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 4.0},
        "loraplus_lr_ratio": 4.0, "layers_to_transform": (1,),
    },
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa_niter_3", "use_rslora": True, "rank_pattern": {"o_proj": 2}},
    "whole": {"modules_to_save": ("model.norm",), "trainable_token_indices": (5, 2000, 300)},
    "OLoRA": {"init_lora_weights": "olora", "dtype": "bfloat16"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _without_the_pictures(monkeypatch):
    """The proof is tested elsewhere; here it would be most of the time."""
    monkeypatch.setattr("phinetune.runs.proof.report_html", lambda path: None)
    monkeypatch.setattr("phinetune.runs.proof.loss_plot", lambda events, path: None)
    monkeypatch.setattr("phinetune.training.forecast._seconds_per_token", lambda *args: (1e-4, 1e-4))


def outcome(run):
    """What must be equal bit for bit: adapter, optimizer, best weights, and the course of the loss."""
    kept = {}
    for path in (run.adapter, run.best, run.checkpoint(6)):
        for file in sorted(path.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                kept[f"{path.name}/{file.name}/{name}"] = tensor
    history = read_history(run.events)
    course = [(step.step, step.loss, step.grad_norm) for step in history.steps]
    return kept, course, [(entry.step, entry.loss) for entry in history.evaluations]


def assert_same(one, two):
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])
    assert any("optimizer" in name for name in one[0])
    assert one[1:] == two[1:]


def cut(project, kind, number, name):
    run = train_run(project, run_name=name)
    for event in run:
        number -= isinstance(event, kind)
        if number == 0:
            break
    run.close()
    return RunFolder(project / "runs" / name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_cut_off_ends_in_the_same_bits_and_its_result_answers(new_project, variant):
    project = new_project(**{**COMMON, **VARIANTS[variant]})
    events = list(train_run(project, run_name="whole"))
    whole = RunFolder(project / "runs" / "whole")
    losses = [entry.loss for entry in read_history(whole.events).evaluations]
    assert min(losses) < losses[0]
    (plan,) = [event.plan for event in events if isinstance(event, Planned)]
    summary = events[-1].summary
    assert sum(row["num_parameters"] for row in plan["coverage"]) > 0
    for number, (kind, count) in enumerate([(Stepped, 3), (Evaluated, 3), (Saved, 2)]):
        run = cut(project, kind, count, f"cut-{number}")
        resumed = list(train_run(project, run_name=run.run_id, resume=True))
        assert isinstance(resumed[-1], Finished)
        assert_same(outcome(run), outcome(whole))

    # What was measured at the end was measured with the saved adapter; it is that of training.
    best = min(losses[1:])
    assert summary["evaluation"]["adapter"]["loss"] == pytest.approx(best, rel=1e-5)
    model = phinetune.load(whole.path, device="cpu")
    assert model.has_own_adapter
    assert isinstance(model.chat("Say red!", max_new_tokens=3), str)

    further = list(train_run(project, run_name="further", from_adapter=whole.adapter))
    (first, *_) = [event.loss for event in further if isinstance(event, Evaluated)]
    assert first == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(
    "variant",
    [
        {"use_dora": True, "modules_to_save": ("model.norm",), "trainable_token_indices": (5, 300)},
        {"init_lora_weights": "pissa", "loraplus_lr_ratio": 4.0},
    ],
)
def test_two_processes_train_what_one_trains(new_project, variant):
    # Sums in another order: Adam's epsilon is raised, as it blows up the last bits of tiny gradients.
    settings = {
        "finetune_train_batch_size": 3,
        "adam_epsilon": 1e-5,
        "learning_rate": 1e-3,
        "lora_dropout": 0.0,
    }
    project = new_project(**{**COMMON, **settings, **variant})
    for name, nproc in (("one", 1), ("two", 2)):
        assert isinstance(list(train_run(project, run_name=name, nproc=nproc))[-1], Finished)
    one, two = (
        load_file(project / "runs" / name / "adapter" / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-6


@pytest.mark.parametrize(
    ("variant", "what"),
    [
        ({"use_dora": True}, "use_dora needs whole weights"),
        ({"init_lora_weights": "pissa"}, "pissa needs whole weights"),
        ({"modules_to_save": ("input_layernorm",)}, "cannot be trained whole"),
    ],
)
def test_what_needs_whole_weights_refuses_a_divided_base(new_project, variant, what):
    project = new_project(**{**COMMON, **variant})
    with pytest.raises(SettingsError, match=what) as caught:
        list(train_run(project, nproc=2, shard=True))
    assert "--shard" in caught.value.do
    assert not (project / "runs").exists()
