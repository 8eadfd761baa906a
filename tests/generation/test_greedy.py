"""Greedy generation: the same tokens as transformers, row by row, however rows are batched."""

from __future__ import annotations

import pytest
import torch

from phinetune.base.errors import UserError
from phinetune.generation import greedy
from phinetune.generation.greedy import generate_batch, stream
from phinetune.models import attention

from .tiny_decoders import ARCHITECTURES, VOCAB, tiny_base


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def by_transformers(base, prompt: list[int], max_new_tokens: int, stop_ids: set[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with base.plain_attention():
        output = base.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(stop_ids),
            pad_token_id=0,
        )
    answer = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in stop_ids else answer


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_row_equals_transformers_generate(name):
    base = tiny_base(name)
    prompts = prompts_of([5, 1, 17, 9, 30, 2, 26, 12, 5, 23, 24, 25, 40])
    stop_ids = {7, 11, 19, 23, 40}
    expected = [by_transformers(base, prompt, 18, stop_ids) for prompt in prompts]
    assert generate_batch(base, prompts, max_new_tokens=18, stop_ids=stop_ids) == expected
    assert len({len(answer) for answer in expected}) > 2, "rows must end at different steps"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stream_gives_the_same_tokens_as_a_batch(name):
    base = tiny_base(name)
    for prompt in prompts_of([3, 20, 30]):
        batch = generate_batch(base, [prompt], max_new_tokens=12, stop_ids={5})[0]
        assert list(stream(base, prompt, max_new_tokens=12, stop_ids={5})) == batch


def test_result_does_not_depend_on_how_rows_are_batched(monkeypatch):
    base = tiny_base("phi3")
    prompts = prompts_of([4, 8, 15, 16, 23, 42, 3])
    together = generate_batch(base, prompts, max_new_tokens=10, stop_ids={7, 11})
    monkeypatch.setattr(greedy, "MAX_ROWS_CPU", 2)
    assert generate_batch(base, prompts, max_new_tokens=10, stop_ids={7, 11}) == together
    monkeypatch.setattr(greedy, "CACHE_BYTES_CPU", 1)
    assert generate_batch(base, prompts, max_new_tokens=10, stop_ids={7, 11}) == together


def test_a_cache_too_small_for_two_rows_answers_one_by_one(monkeypatch):
    base = tiny_base("phi3")
    prompts = prompts_of([10] * 3)
    expected = generate_batch(base, prompts, max_new_tokens=5, stop_ids=())
    bytes_per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32
    monkeypatch.setattr(greedy, "CACHE_BYTES_CPU", 15 * bytes_per_token)
    seen = []
    answers = generate_batch(
        base, prompts, max_new_tokens=5, stop_ids=(), on_progress=lambda done, _: seen.append(done)
    )
    assert answers == expected
    assert seen == [1, 2, 3]


def test_prompt_longer_than_the_context_is_refused_with_the_usable_length():
    base = tiny_base("phi3")
    with pytest.raises(UserError, match="64 tokens does not fit") as caught:
        generate_batch(base, prompts_of([3, 64]), max_new_tokens=4, stop_ids=())
    assert "longest usable prompt has 63" in str(caught.value)
    assert "prompt 2 of 2" in str(caught.value)
    with pytest.raises(UserError, match="does not fit"):
        stream(base, prompts_of([64])[0], max_new_tokens=4, stop_ids=())


def test_empty_prompt_is_refused():
    with pytest.raises(UserError, match="no tokens"):
        generate_batch(tiny_base("llama"), [[3], []], max_new_tokens=4, stop_ids=())


@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_answer_ends_where_the_context_is_full(name):
    base = tiny_base(name)
    assert base.max_length == 64
    answers = generate_batch(base, prompts_of([63, 60, 10]), max_new_tokens=8, stop_ids=())
    assert [len(answer) for answer in answers] == [1, 4, 8]


def test_no_new_tokens_and_no_prompts_give_nothing():
    base = tiny_base("phi3")
    assert generate_batch(base, [], max_new_tokens=4, stop_ids=()) == []
    assert generate_batch(base, [[3], [4]], max_new_tokens=0, stop_ids=()) == [[], []]


def test_model_is_left_as_it_was_even_while_a_stream_is_paused():
    base = tiny_base("phi3")
    base.model.train()
    base.model.model.layers[0].eval()
    before = [module.training for module in base.model.modules()]
    tokens = stream(base, [3, 4, 5], max_new_tokens=5, stop_ids=())
    next(tokens)
    assert [module.training for module in base.model.modules()] == before
    assert base.model.config._attn_implementation == attention.IMPLEMENTATION
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    tokens.close()
    with pytest.raises(StopIteration):
        next(tokens)


def test_progress_counts_prompts_up_to_all(monkeypatch):
    monkeypatch.setattr(greedy, "MAX_ROWS_CPU", 2)
    seen = []
    generate_batch(
        tiny_base("phi3"),
        prompts_of([4, 4, 4, 4, 4]),
        max_new_tokens=2,
        stop_ids=(),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_dropout_is_off_while_answering():
    base = tiny_base("phi3")
    quiet = generate_batch(base, [[3, 4, 5]], max_new_tokens=12, stop_ids=())
    base.model.config.resid_pdrop = 0.5
    for layer in base.model.model.layers:
        layer.resid_attn_dropout.p = layer.resid_mlp_dropout.p = 0.5
    base.model.train()
    assert generate_batch(base, [[3, 4, 5]], max_new_tokens=12, stop_ids=()) == quiet
