"""Base against adapter: the figures are those of plain transformers, and nothing is left out in silence."""

from __future__ import annotations

import math

import pytest
import torch

from phinetune.base.errors import DataError
from phinetune.data.conversation import Conversation, Message, Source
from phinetune.evaluation.bootstrap import reading
from phinetune.evaluation.compare import compare

from .letters import LetterRenderer, attached, letters_base, text, train, turn

ANIMALS = ["cat", "dog", "owl", "fox", "hen", "bee", "ant", "elk"]
PAIRS = [turn(name, name.upper(), line) for line, name in enumerate(ANIMALS, 1)]


@pytest.fixture(scope="module")
def taught():
    base = letters_base()
    adapter = attached(base)
    train(base, adapter, [LetterRenderer().example(pair) for pair in PAIRS], num_steps=120)
    return base, adapter


def loss_by_transformers(base, rendered) -> tuple[float, int]:
    """Summed loss of one example alone, through the model's own forward and ordinary attention."""
    ids = torch.from_numpy(rendered.ids).long()
    with torch.no_grad(), base.plain_attention():
        logits = base.model(input_ids=ids[None], use_cache=False).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    trained = torch.from_numpy(rendered.trained[1:])
    return float(losses[trained].sum()), int(trained.sum())


def test_a_taught_adapter_is_found_better_in_every_measure(taught):
    base, adapter = taught
    found = compare(base, adapter, LetterRenderer(), PAIRS, seed=1)
    assert found.base["exact_match"] == 0.0
    assert found.adapter["exact_match"] == 1.0
    for metric in ("loss", "perplexity", "token_accuracy", "exact_match", "token_f1"):
        assert reading(metric, found.difference[metric]) == "better"
    assert found.num_scored == found.num_answered == len(PAIRS)
    assert all(answer.adapter == answer.reference == answer.prompt.upper() for answer in found.answers)


def test_losses_equal_plain_transformers_one_example_at_a_time(taught):
    base, adapter = taught
    renderer = LetterRenderer()
    examples = [*PAIRS, turn("a longer question", "x" * 20), text("plain text")]
    found = compare(base, adapter, renderer, examples)
    for figures, context in ((found.base, adapter.disabled), (found.adapter, lambda: torch.no_grad())):
        with context():
            parts = [loss_by_transformers(base, renderer.example(example)) for example in examples]
        loss = sum(part[0] for part in parts) / sum(part[1] for part in parts)
        assert figures["loss"] == pytest.approx(loss, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_untrained_adapter_changes_nothing():
    base = letters_base()
    found = compare(base, attached(base), LetterRenderer(), PAIRS)
    assert found.base == found.adapter
    for metric, difference in found.difference.items():
        assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
        assert reading(metric, difference) == "no clear difference"


def test_plain_text_has_losses_and_no_answers(taught):
    base, adapter = taught
    found = compare(base, adapter, LetterRenderer(), [text(name) for name in ANIMALS])
    assert set(found.base) == {"loss", "perplexity", "token_accuracy"}
    assert (found.num_scored, found.num_answered, found.answers) == (8, 0, ())


def test_too_long_examples_are_counted_and_left_out(taught):
    base, adapter = taught
    with_long = compare(base, adapter, LetterRenderer(), [PAIRS[0], turn("x" * 60, "y"), *PAIRS[1:]])
    without = compare(base, adapter, LetterRenderer(), PAIRS)
    assert with_long.num_scored == 8
    assert with_long.base == without.base
    assert any("1 of 9 examples are longer" in note and "48 tokens" in note for note in with_long.notes)
    assert with_long.rows[1].num_trained_tokens == 0
    assert with_long.rows[1].base == {}


def test_pieces_of_one_text_count_as_one_example(taught):
    base, adapter = taught
    renderer = LetterRenderer()
    texts = [text("one long text"), text("another")]
    parts = [(0, renderer.example(text("one lo"))), (0, renderer.example(text("ng text")))]
    parts.append((1, renderer.example(texts[1])))
    found = compare(base, adapter, renderer, texts, pieces=parts)
    apart = compare(base, adapter, renderer, [text("one lo"), text("ng text"), texts[1]])
    assert found.base == pytest.approx(apart.base)
    assert [row.num_trained_tokens for row in found.rows] == [6 + 7, 7]


def test_a_limit_on_answers_is_said_and_the_choice_is_seeded(taught):
    base, adapter = taught
    found = compare(base, adapter, LetterRenderer(), PAIRS, max_answered=3, seed=1)
    assert (found.num_scored, found.num_answered) == (8, 3)
    assert "3 of 8 conversations were answered, chosen by the seed" in found.notes
    assert sum("exact_match" in row.base for row in found.rows) == 3
    assert compare(base, adapter, LetterRenderer(), PAIRS, max_answered=3, seed=1) == found
    assert compare(base, adapter, LetterRenderer(), PAIRS, max_answered=3, seed=2).answers != found.answers


def test_nothing_to_compare_is_an_error(taught):
    base, adapter = taught
    with pytest.raises(DataError, match="nothing to compare"):
        compare(base, adapter, LetterRenderer(), [])
    with pytest.raises(DataError, match="at most 48 tokens"):
        compare(base, adapter, LetterRenderer(), [turn("x" * 60, "y")])


def test_number_of_new_tokens_comes_from_the_longest_reference_and_is_said(taught):
    base, adapter = taught
    found = compare(base, adapter, LetterRenderer(), [*PAIRS, turn("q", "abcdefgh")])
    assert found.max_new_tokens == 10 + 16
    assert any("26 new tokens" in note for note in found.notes)
    given = compare(base, adapter, LetterRenderer(), PAIRS, max_new_tokens=2)
    assert given.max_new_tokens == 2
    assert all(len(answer.adapter) <= 2 for answer in given.answers)
    assert "8 of 8 answers of the adapter were stopped at the token limit" in given.notes


def test_empty_reference_is_matched_by_an_empty_answer_only():
    base = letters_base()
    adapter = attached(base)
    empty = [turn(name, "", line) for line, name in enumerate(ANIMALS, 1)]
    train(base, adapter, [LetterRenderer().example(pair) for pair in empty], num_steps=30)
    found = compare(base, adapter, LetterRenderer(), empty)
    assert (found.base["exact_match"], found.adapter["exact_match"]) == (0.0, 1.0)
    assert (found.base["token_f1"], found.adapter["token_f1"]) == (0.0, 1.0)


def test_prompt_is_all_before_the_last_assistant_turn(taught):
    base, adapter = taught
    messages = (
        Message(role="user", content="hi"),
        Message(role="assistant", content="yo"),
        Message(role="user", content="cat"),
        Message(role="assistant", content="CAT"),
        Message(role="user", content="bye"),
    )
    example = Conversation(messages=messages, source=Source(file="t", line=1))
    found = compare(base, adapter, LetterRenderer(), [example])
    assert found.answers[0].prompt == "user: hi\n\nassistant: yo\n\nuser: cat"
    assert found.answers[0].reference == "CAT"


def test_system_prompt_reaches_losses_and_answers(taught):
    base, adapter = taught
    plain = compare(base, adapter, LetterRenderer(), PAIRS)
    instructed = compare(base, adapter, LetterRenderer(), PAIRS, system_prompt="shout")
    assert instructed.base["loss"] != plain.base["loss"]
    assert instructed.answers != plain.answers


def test_json_measures_appear_only_when_all_references_are_objects(taught):
    base, adapter = taught
    objects = [turn(name, '{"n": 1}', line) for line, name in enumerate(ANIMALS, 1)]
    assert {"json_valid", "field:n"} <= set(compare(base, adapter, LetterRenderer(), objects).base)
    mixed = compare(base, adapter, LetterRenderer(), [*objects, PAIRS[0]])
    assert not {"json_valid", "field:n"} & set(mixed.base)


def test_same_seed_same_comparison_and_the_sample_shown_is_seeded(taught):
    base, adapter = taught
    first = compare(base, adapter, LetterRenderer(), PAIRS, num_answers_shown=3, seed=5)
    again = compare(base, adapter, LetterRenderer(), PAIRS, num_answers_shown=3, seed=5)
    assert first == again
    shown = {
        tuple(
            a.prompt
            for a in compare(base, adapter, LetterRenderer(), PAIRS, num_answers_shown=3, seed=s).answers
        )
        for s in range(4)
    }
    assert len(shown) > 1


def test_progress_rises_to_all_examples_scored_and_answered_twice(taught):
    base, adapter = taught
    seen: list[tuple[int, int]] = []
    compare(base, adapter, LetterRenderer(), [*PAIRS, text("plain")], on_progress=lambda *p: seen.append(p))
    assert {total for _, total in seen} == {2 * (9 + 8)}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == 2 * (9 + 8)


def test_training_mode_and_adapter_are_as_before(taught):
    base, adapter = taught
    base.model.train()
    compare(base, adapter, LetterRenderer(), PAIRS[:2])
    assert base.model.training
    assert all(layer.is_enabled for layer in adapter.layers.values())
    base.model.eval()


def test_evaluation_part_of_the_summary_is_plain_json(taught):
    base, adapter = taught
    part = compare(base, adapter, LetterRenderer(), PAIRS[:2]).evaluation()
    assert set(part) == {"base", "adapter", "difference"}
    assert set(part["difference"]["loss"]) == {"value", "low", "high"}
    assert part["difference"]["loss"]["low"] is None, "two examples give no interval"
