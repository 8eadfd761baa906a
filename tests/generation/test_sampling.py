"""Sampling: the shares that are drawn from are those of the definition, and the seed decides alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from phinetune.base.errors import UserError
from phinetune.generation.sampling import GREEDY, Dice, Sampling, choose

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0, 2.5])
NUM_DRAWS = 4000


def shares(sampling, *, prompt=(), answer=()):
    """How often each token is drawn."""
    dice = Dice(0)
    drawn = Counter(choose(LOGITS, sampling, prompt, answer, dice).token for _ in range(NUM_DRAWS))
    return torch.tensor([drawn[token] / NUM_DRAWS for token in range(len(LOGITS))])


def near(expected):
    return pytest.approx(expected.tolist(), abs=0.03)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_share_at_the_temperature(temperature):
    expected = torch.softmax(LOGITS / temperature, dim=0)
    assert shares(Sampling(temperature=temperature)).tolist() == near(expected)


def test_top_k_keeps_the_k_likeliest():
    expected = torch.zeros(6)
    expected[[3, 5]] = torch.softmax(LOGITS[[3, 5]], dim=0)
    assert shares(Sampling(temperature=1, top_k=2)).tolist() == near(expected)


def test_top_p_keeps_the_fewest_that_hold_the_share():
    full = torch.softmax(LOGITS, dim=0)
    assert float(full[3]) < 0.7 < float(full[3] + full[5])
    expected = torch.zeros(6)
    expected[[3, 5]] = full[[3, 5]] / full[[3, 5]].sum()
    assert shares(Sampling(temperature=1, top_p=0.7)).tolist() == near(expected)


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    full = torch.softmax(LOGITS, dim=0)
    keep = full >= 0.3 * full.max()
    assert keep.tolist() == [False, False, True, True, False, True]
    expected = full * keep / (full * keep).sum()
    assert shares(Sampling(temperature=1, min_p=0.3)).tolist() == near(expected)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1, top_p=0.0), Sampling(temperature=1, top_k=1)])
def test_the_narrowest_choice_is_the_likeliest(sampling):
    assert shares(sampling)[3] == 1


def test_penalties_and_bias_are_those_of_their_definitions():
    bias = {0: 5.0, 3: -100.0}
    assert choose(LOGITS, Sampling(logit_bias=bias), (), (), Dice(0)).token == 0
    # 3.0 - 0.4 - 2 * 0.2 = 2.2 falls behind 2.5; once seen it would stay ahead.
    both = Sampling(presence_penalty=0.4, frequency_penalty=0.2)
    assert choose(LOGITS, both, (), (3, 3), Dice(0)).token == 5
    assert choose(LOGITS, both, (), (), Dice(0)).token == 3
    assert choose(LOGITS, Sampling(presence_penalty=0.4), (3,), (), Dice(0)).token == 3, "answers only"
    # 3.0 / 1.3 = 2.31: the repetition penalty sees the prompt as well.
    assert choose(LOGITS, Sampling(repetition_penalty=1.3), (3,), (), Dice(0)).token == 5
    assert float(LOGITS[3]) == 3.0, "the logits are left as they were"


def test_negative_logits_are_penalised_downwards():
    logits = torch.tensor([-1.0, -1.1])
    assert choose(logits, Sampling(repetition_penalty=1.2), (0,), (), Dice(0)).token == 1


def test_the_seed_alone_decides():
    sampling = Sampling(temperature=1.0)
    one, two, other = (
        [choose(LOGITS, sampling, (), (), dice).token for _ in range(20)]
        for dice in (Dice(3), Dice(3), Dice(4))
    )
    assert one == two != other


def test_greedy_draws_nothing():
    dice = Dice(1)
    choose(LOGITS, GREEDY, (), (), dice)
    assert torch.equal(dice.roll(3), Dice(1).roll(3))


def test_rounding_in_the_logits_changes_no_choice():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, generator=generator)
    one, other = Dice(5), Dice(5)
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=0.9, top_p=0.9, top_k=40)):
        for _ in range(300):
            near = logits + 1e-6 * torch.randn(4000, generator=generator)
            assert choose(logits, sampling, (), (), one) == choose(near, sampling, (), (), other)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_p", 1.5), ("min_p", -0.1), ("presence_penalty", 3), ("num_logprobs", 21)],
)
def test_values_out_of_range_are_refused_with_the_range(name, value):
    with pytest.raises(UserError, match=name) as caught:
        Sampling(**{name: value})
    assert "write a number from" in caught.value.do
