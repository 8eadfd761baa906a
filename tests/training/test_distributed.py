"""The work of a step is divided without loss, and two processes agree on everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import tiny_training

from phinetune.base.errors import SpaceError
from phinetune.base.events import Stepped, Trained
from phinetune.runs.processes import on_loopback
from phinetune.training.distributed import ALONE, Ranks, divided

STEPS = {
    "finetune_train_batch_size": 4, "num_training_steps": 4, "adam_epsilon": 1e-5, "learning_rate": 1e-3,
    "eval_steps": 2, "save_steps": 2,
}  # fmt: skip
TOKENS = st.lists(st.integers(1, 2048), max_size=40)


@given(TOKENS, st.integers(1, 9))
def test_every_sequence_goes_to_one_rank_in_its_order(tokens, num_ranks):
    sequences = [(2 * place, 2 * place + 1) for place in range(len(tokens))]
    shares = divided(sequences, tokens, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(sequence for share in shares for sequence in share) == sequences
    assert all(share == sorted(share) for share in shares)
    assert shares == divided(sequences, tokens, num_ranks)


@given(TOKENS, st.integers(1, 9))
def test_no_rank_waits_for_another_by_more_than_one_sequence(tokens, num_ranks):
    sequences = [(place,) for place in range(len(tokens))]
    loads = [sum(tokens[row] for (row,) in share) for share in divided(sequences, tokens, num_ranks)]
    assert max(loads) - min(loads) <= max(tokens, default=0)


def test_with_fewer_sequences_than_ranks_some_have_nothing():
    assert divided([(0,), (1,)], [3, 9], 4) == [[(1,)], [(0,)], [], []]


def test_one_process_alone_talks_to_nobody():
    loss = torch.tensor(2.0)
    ALONE.add_gradients([], loss)
    ALONE.require_equal_weights([torch.ones(3)])
    assert loss == 2
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.from_first(b"word") == b"word"
    assert list(ALONE.passes([[1, 2], [3]], filler=[9])) == [([1, 2], 1.0), ([3], 1.0)]
    with pytest.raises(torch.OutOfMemoryError), ALONE.full_together():
        raise torch.OutOfMemoryError


def test_with_a_divided_base_full_memory_ends_the_process_at_once():
    """The others wait inside a forward pass: an agreement with them would never come about."""
    with pytest.raises(SpaceError, match="memory is full"), Ranks(size=2, is_sharded=True).full_together():
        raise torch.OutOfMemoryError


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw in every case of two_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_ranks.py")
    with on_loopback():
        environment = dict(os.environ)
    outs = [folder / f"{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, script, folder / "store", str(rank), out], env=environment)
        for rank, out in enumerate(outs)
    ]
    try:
        assert [process.wait(150) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads(out.read_text("utf-8")) for out in outs]


def alone(**changes):
    training = tiny_training(**{**STEPS, **changes})
    events = training.events()
    steps = [event for event in events if isinstance(event, Stepped)]
    (trained,) = (event for event in events if isinstance(event, Trained))
    return steps, trained, training.adapter.snapshot()


def furthest(one, two):
    assert one.keys() == two.keys()
    return max((torch.tensor(one[name]) - two[name]).abs().max().item() for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["alike", "full_memory"])
def test_both_end_with_the_bits_of_each_other_and_the_result_of_one(answers, case):
    """In `full_memory` only one of them runs out: both go on in halved pieces."""
    first, second = (answer[case] for answer in answers)
    assert first == second
    steps, trained, weights = alone()
    assert first["losses"] == pytest.approx([step.loss for step in steps], rel=1e-6)
    assert first["norms"] == pytest.approx([step.grad_norm for step in steps], rel=1e-5)
    assert first["best_step"] == trained.best_step
    assert furthest(first["weights"], weights) < 1e-6
    assert bool(first["warned"]) is (case == "full_memory")


@pytest.mark.slow
def test_which_rows_share_their_beginning_changes_nothing(answers):
    """Each process computes it once for its own rows."""
    first, second = (answer["same_beginning"] for answer in answers)
    assert first == second
    steps, _, weights = alone(num_shared=24, finetune_train_seqlen=128)
    assert first["losses"] == pytest.approx([step.loss for step in steps], rel=1e-6)
    assert furthest(first["weights"], weights) < 1e-6


@pytest.mark.slow
def test_dropout_is_at_work_and_leaves_both_alike(answers):
    first, second = (answer["with_dropout"] for answer in answers)
    assert first == second
    assert first["losses"][1:] != answers[0]["alike"]["losses"][1:]


@pytest.mark.slow
def test_the_whole_state_of_the_first_reaches_the_other(answers):
    first, second = (answer["state_of_the_first"] for answer in answers)
    assert first == second
    assert first["step"] == 4
    assert first["best"]
    assert all(entry["step"] == 4 and entry["exp_avg_sq"] > 0 for entry in first["moments"])


@pytest.mark.slow
def test_weights_that_came_apart_end_the_run_everywhere(answers):
    for answer in answers:
        assert answer["weights_apart"]["error"] == "LostProcessError"
        assert "no longer the same" in answer["weights_apart"]["what"]


@pytest.mark.slow
def test_other_data_on_another_machine_is_refused_by_name(answers):
    assert answers[0]["other_facts"] == {}
    assert answers[1]["other_facts"]["error"] == "UserError"
    assert answers[1]["other_facts"]["why"] == "train data: 1, there 0"


@pytest.mark.slow
def test_what_one_says_all_hear(answers):
    for answer in answers:
        assert answer["a_word_to_all"] == {
            "told": ["from the first", ""],
            "any": [True, False],
            "highest": 10,
        }


@pytest.mark.slow
def test_each_process_holds_its_part_of_a_divided_base(answers):
    first, second = (answer["divided_base"] for answer in answers)
    assert first["furthest"] == second["furthest"] == 0 < first["largest"]
    assert first["whole"] == second["whole"] == first["part"] + second["part"]
    assert 0.4 < first["part"] / first["whole"] < 0.6
