"""A model with its adapters: each side answers as it does alone, and sides differ by their weights only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phinetune.base.errors import AdapterError, IncompatibleLowRankAdapter, UserError
from phinetune.data.conversation import Message
from phinetune.generation.model import Model
from phinetune.generation.sampling import Sampling
from phinetune.lora.files import load_weights
from phinetune.models.loading import load_base
from phinetune.text.render import load_renderer

from .random_adapters import random_adapter
from .tiny_decoders import tiny_base

PROMPTS = ["Hello there", [Message(role="user", content="And a story?")], "One more thing"]


@pytest.fixture(scope="module")
def weights():
    base = load_base("demo", device_name="cpu", dtype="float32")
    return {
        name: random_adapter(base.model, rank=rank, seed=rank) for name, rank in (("adapter", 2), ("b", 4))
    }


def a_model(**more):
    base = load_base("demo", device_name="cpu", dtype="float32")
    return Model("demo", base, load_renderer(base.folder), **more)


def test_all_sides_in_one_batch_answer_as_each_does_alone(weights):
    model = a_model()
    for name, adapter in weights.items():
        model.load_adapter(name, adapter)
    sides = ["base", "adapter", "b"]
    together = model.answers(PROMPTS, sides, max_new_tokens=20)
    for side in sides:
        alone = [
            model.chat(
                prompt, adapter=None if side == "base" else side, with_adapter=False, max_new_tokens=20
            )
            for prompt in PROMPTS
        ]
        assert together[side] == alone
    assert len({tuple(answers) for answers in together.values()}) == 3
    assert model.adapters == ["adapter", "b"]
    assert model.chat(PROMPTS[0], max_new_tokens=20) == together["adapter"][0]


def test_the_same_weights_draw_the_same_on_both_sides(weights):
    model = a_model()
    model.load_adapter("one", weights["b"])
    model.load_adapter("two", weights["b"])
    warm = Sampling(temperature=1.5, seed=3)
    found = model.answers(PROMPTS, ["one", "two"], sampling=warm, max_new_tokens=20)
    assert found["one"] == found["two"]
    assert found["one"] != model.answers(PROMPTS, ["one"], max_new_tokens=20)["one"]


def test_an_attached_adapter_answers_the_same_and_takes_no_others(weights):
    base = load_base("demo", device_name="cpu", dtype="float32")
    attached = load_weights(base.model, weights["adapter"], where="a test")
    model = Model("demo", base, load_renderer(base.folder), attached=attached)
    mixed = a_model()
    mixed.load_adapter("adapter", weights["adapter"])
    sides = ["base", "adapter"]
    expected = mixed.answers(PROMPTS, sides, max_new_tokens=20)
    assert model.answers(PROMPTS, sides, max_new_tokens=20) == expected
    assert model.chat(PROMPTS[0], with_adapter=False, max_new_tokens=20) == expected["base"][0]
    with pytest.raises(Exception, match="already has an adapter"):
        model.load_adapter("b", weights["b"])


def test_a_stop_string_ends_the_text():
    model = a_model()
    whole = model.chat("Tell me a story", max_new_tokens=40)
    stop = whole[8:11]
    assert model.chat("Tell me a story", max_new_tokens=40, stop=[stop]) == whole[: whole.index(stop)]
    assert model.engine.is_idle


def test_an_adapter_of_other_weights_is_taken_by_force_alone_and_said(weights):
    model = a_model()
    foreign = replace(weights["b"], metadata={"base_sha256": "b" * 64})
    with pytest.raises(IncompatibleLowRankAdapter, match="another base model"):
        model.load_adapter("b", foreign)
    assert model.adapters == []
    model.load_adapter("b", foreign, force_base=True)
    assert model.adapters == ["b"]
    assert "bbbbbbbbbbbb" in model.forced["b"]
    model.load_adapter("c", replace(foreign, metadata={"base_sha256": model.base.sha256}), force_base=True)
    model.load_adapter("d", weights["b"], force_base=True)
    assert list(model.forced) == ["b"], "nothing was overridden for the others"
    with pytest.raises(IncompatibleLowRankAdapter):
        model.load_adapter("x", random_adapter(tiny_base("llama").model, rank=2, seed=0), force_base=True)
    assert "x" not in model.forced
    answers = model.answers(PROMPTS, ["base", "b", "d"], max_new_tokens=8)
    assert answers["b"] == answers["d"] != answers["base"]


def test_names_that_are_taken_and_adapters_that_do_not_fit_are_refused(weights):
    model = a_model()
    with pytest.raises(AdapterError, match="'base' is taken"):
        model.load_adapter("base", weights["b"])
    with pytest.raises(IncompatibleLowRankAdapter):
        model.load_adapter("x", random_adapter(tiny_base("llama").model, rank=2, seed=0))
    with pytest.raises(AdapterError, match="no adapter 'y'"):
        model.chat("Hello", adapter="y")


def test_too_long_a_prompt_says_how_much_of_it_could_be_used():
    model = a_model()
    prompt = "word " * 3 * model.base.max_length
    with pytest.raises(UserError, match="the prompt has") as caught:
        model.chat(prompt, max_new_tokens=1)
    assert f"of the last message's {len(prompt):,} characters" in caught.value.why
    usable = int(caught.value.why.rsplit(" could", 1)[0].rsplit(" ", 1)[-1].replace(",", ""))
    assert len(model.prompt_ids(prompt[:usable])) < model.base.max_length
    assert len(model.prompt_ids(prompt[: usable + 20])) >= model.base.max_length
