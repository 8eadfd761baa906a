"""The Windows-shaped LanguageModel: statuses, streams, and the documentation's sample as it stands."""

from __future__ import annotations

import asyncio
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from phinetune.base.errors import AdapterError, ModelError
from phinetune.generation import language_model
from phinetune.generation.language_model import (
    AIFeatureReadyState,
    ContentFilterOptions,
    LanguageModel,
    LanguageModelExperimental,
    LanguageModelOptions,
    LanguageModelResponseStatus,
    LowRankAdapter,
    SeverityLevel,
    TextContentFilterSeverity,
)
from phinetune.lora.forms import write_adapter
from phinetune.models.loading import load_base
from phinetune.safety.categories import Category, Severity

from .random_adapters import random_adapter
from .tiny_decoders import tiny_base

DOCS = Path(__file__).parents[2] / "docs" / "language-model.md"
Status = LanguageModelResponseStatus
GREEDY = {"temperature": 0.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory):
    base = load_base("demo", device_name="cpu", dtype="float32")
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    write_adapter(random_adapter(base.model, rank=4, seed=1), path, "single")
    return path


def run(work):
    """Run `work(model)` with a demo model in float32."""

    async def main():
        async with await LanguageModel.create_async(device="cpu", dtype="float32") as model:
            return await work(model)

    return asyncio.run(main())


def test_the_documentations_sample_runs(adapter_file, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(adapter_file.read_bytes())
    (tmp_path / "sample.py").write_text(code, encoding="utf-8")
    runpy.run_path(str(tmp_path / "sample.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("COMPLETE ")


def test_a_stream_gives_the_awaited_text_piece_by_piece():
    async def work(model):
        options = LanguageModelOptions(seed=3, max_new_tokens=40)
        whole = await model.generate_response_async("Tell me a story", options)
        operation = model.generate_response_async("Tell me a story", options)
        assert operation.status is Status.IN_PROGRESS
        pieces = [piece async for piece in operation]
        assert operation.status is Status.COMPLETE
        return whole, pieces, await operation

    whole, pieces, again = run(work)
    assert whole.status is Status.COMPLETE
    assert "".join(pieces) == whole.text == again.text
    assert len(pieces) > 3


def test_answers_beside_each_other_are_each_their_own(adapter_file):
    async def work(model):
        adapter = LowRankAdapter.create_from_path(adapter_file).low_rank_adapter
        asked = [(f"Question {i}", LanguageModelOptions(**GREEDY)) for i in range(3)]
        asked += [
            (f"Question {i}", LanguageModelOptions(**GREEDY, low_rank_adapter=adapter)) for i in range(3)
        ]
        single = [await model.generate_response_async(*one) for one in asked]
        together = await asyncio.gather(*(_awaited(model.generate_response_async(*one)) for one in asked))
        return single, together

    single, together = run(work)
    assert single == together
    assert len({result.text for result in single}) > 3


async def _awaited(operation):
    return await operation


def test_without_a_seed_every_call_draws_anew_and_with_one_the_same():
    async def work(model):
        texts = []
        for seed in (None, None, 5, 5):
            options = LanguageModelOptions(seed=seed, temperature=2.0, max_new_tokens=30)
            result = await model.generate_response_async("Tell me a story about a cat", options)
            texts.append(result.text)
        return texts

    one, other, first, second = run(work)
    assert one != other
    assert first == second


def test_a_context_holds_the_conversation():
    async def work(model):
        context = model.create_context("Be brief.")
        first = await model.generate_response_async("Hello", LanguageModelOptions(**GREEDY), context=context)
        await model.generate_response_async("And now?", LanguageModelOptions(**GREEDY), context=context)
        return first, context

    first, context = run(work)
    roles = [message.role for message in context.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert context.messages[2].content == first.text


def test_a_prompt_larger_than_the_context_is_refused_with_what_fits():
    async def work(model):
        prompt = "é word " * 2000
        result = await model.generate_response_async(prompt)
        usable = model.get_usable_prompt_length(prompt)
        fits = prompt.encode()[:usable].decode()
        short = await model.generate_response_async(fits, LanguageModelOptions(**GREEDY))
        more = await model.generate_response_async(prompt[: len(fits) + 6], LanguageModelOptions(**GREEDY))
        return result, short, more, model.get_usable_prompt_length("short"), len(fits), len(prompt)

    result, short, more, of_short, num_fit, num_all = run(work)
    assert result.status is more.status is Status.PROMPT_LARGER_THAN_CONTEXT
    assert f"{num_fit:,} of the prompt's {num_all:,} characters" in result.extended_error.why
    assert short.status is Status.COMPLETE
    assert of_short == len("short")


def test_an_adapter_of_another_base_is_told_before_the_first_token(tmp_path):
    write_adapter(
        random_adapter(tiny_base("llama").model, rank=2, seed=0), tmp_path / "a.safetensors", "single"
    )

    async def work(model):
        adapter = LowRankAdapter.create_from_path(tmp_path / "a.safetensors").low_rank_adapter
        assert adapter
        return await model.generate_response_async("Hello", LanguageModelOptions(low_rank_adapter=adapter))

    result = run(work)
    assert result.status is Status.INCOMPATIBLE_LOW_RANK_ADAPTER
    assert result.text == ""
    assert result.extended_error


def test_an_adapter_of_other_weights_answers_by_force_alone(tmp_path):
    base = load_base("demo", device_name="cpu", dtype="float32")
    foreign = replace(random_adapter(base.model, rank=4, seed=1), metadata={"base_sha256": "b" * 64})
    write_adapter(foreign, tmp_path / "a.safetensors", "single")

    async def work(model):
        results = []
        for force in (False, True):
            made = LowRankAdapter.create_from_path(tmp_path / "a.safetensors", force_base=force)
            options = LanguageModelOptions(low_rank_adapter=made.low_rank_adapter, **GREEDY)
            results.append(await model.generate_response_async("Hello", options))
        return results

    refused, forced = run(work)
    assert refused.status is Status.INCOMPATIBLE_LOW_RANK_ADAPTER
    assert refused.text == ""
    assert "bbbbbbbbbbbb" in refused.extended_error.why
    assert forced.status is Status.COMPLETE
    assert forced.text


def test_a_file_that_is_no_adapter_gives_the_error_and_no_adapter(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"no tensors")
    result = LowRankAdapter.create_from_path(path)
    assert result.low_rank_adapter is None
    assert isinstance(result.extended_error, AdapterError)
    with pytest.raises(AdapterError):
        LanguageModelExperimental(None).load_adapter(path)


class Listed:
    """A classifier that knows one word."""

    def severities(self, text):
        found = dict.fromkeys(Category, Severity.SAFE)
        return {**found, Category.VIOLENCE: Severity.MEDIUM} if "boom" in text.lower() else found


def test_moderation_keeps_prompts_and_answers_back(monkeypatch):
    monkeypatch.setattr("phinetune.safety.content_filter.bundled", Listed)
    strict = ContentFilterOptions()
    lenient = ContentFilterOptions(
        prompt_max_allowed_severity_level=TextContentFilterSeverity(violent=SeverityLevel.HIGH)
    )

    async def work(model):
        options = LanguageModelOptions(**GREEDY, content_filter_options=strict)
        blocked = await model.generate_response_async("Boom!", options)
        passed = await model.generate_response_async("Hello", options)
        free = await model.generate_response_async("Boom!", LanguageModelOptions(**GREEDY))
        monkeypatch.setattr(model._renderer, "decode", lambda ids: "boom " * len(ids))
        options = LanguageModelOptions(**GREEDY, content_filter_options=lenient)
        operation = model.generate_response_async("Boom!", options)
        pieces = [piece async for piece in operation]
        return blocked, passed, free, pieces, await operation

    blocked, passed, free, pieces, answer = run(work)
    assert blocked.status is Status.PROMPT_BLOCKED_BY_CONTENT_MODERATION
    assert passed.status is free.status is Status.COMPLETE
    assert answer.status is Status.RESPONSE_BLOCKED_BY_CONTENT_MODERATION
    assert pieces == []
    assert answer.text == ""


def test_a_cancelled_answer_keeps_what_has_come():
    async def work(model):
        operation = model.generate_response_async("Tell me", LanguageModelOptions(seed=1, max_new_tokens=800))
        text = ""
        async for piece in operation:
            text += piece
            operation.cancel()
        result = await operation
        engine = model._responder.engine
        assert engine.is_idle
        return text, result

    text, result = run(work)
    assert result.text.startswith(text[:5])
    assert len(result.text) < 400


def test_ready_states(monkeypatch):
    assert LanguageModel.get_ready_state() is AIFeatureReadyState.READY
    assert LanguageModel.get_ready_state("someone/some-model") is AIFeatureReadyState.NOT_READY
    nowhere = LanguageModel.get_ready_state("./no/such/folder")
    assert nowhere is AIFeatureReadyState.NOT_SUPPORTED_ON_CURRENT_SYSTEM
    with pytest.raises(ModelError, match="is not on this machine"):
        asyncio.run(LanguageModel.create_async("someone/some-model"))
    seen = []
    asyncio.run(LanguageModel.ensure_ready_async(on_progress=seen.append))
    assert seen == [0.0, 1.0]


def test_values_are_those_of_windows():
    assert [int(status) for status in Status] == list(range(8))
    assert [int(level) for level in SeverityLevel] == [10, 11, 12, 13]
    defaults = LanguageModelOptions()
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.9, 0.9, 40)
    assert language_model.LowRankAdaptation is LowRankAdapter
