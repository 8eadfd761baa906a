"""The engine: a row's answer is its own, whatever adapters and rows are beside it, come or go."""

from __future__ import annotations

import random
import time

import peft
import pytest
import torch

from phinetune.base.errors import AdapterError, IncompatibleLowRankAdapter, SettingsError, UserError
from phinetune.generation.engine import Engine
from phinetune.generation.request import Request, State
from phinetune.generation.sampling import Sampling
from phinetune.generation.scheduler import Limits
from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.files import load_weights

from .random_adapters import random_adapter
from .test_greedy import by_transformers, prompts_of
from .tiny_decoders import ARCHITECTURES, tiny_base

RANKS = {"a": 2, "b": 4, "c": 8}
STOP = frozenset({7, 11, 19})


def adapters_of(base):
    return {name: random_adapter(base.model, rank=rank, seed=rank) for name, rank in RANKS.items()}


def request(prompt, adapter=None, *, max_new_tokens=12, **more):
    return Request(
        prompt=tuple(prompt), adapter=adapter, max_new_tokens=max_new_tokens, stop_ids=STOP, **more
    )


def finish(engine):
    while not engine.is_idle:
        engine.step()


def alone(base, prompt, weights=None, **more):
    """The answer of a row that has the model to itself, its adapter attached or merged into nothing."""
    adapter = load_weights(base.model, weights, where="a test") if weights else None
    with Engine(base, Limits(prefix_cache_bytes=0)) as engine:
        tokens = list(engine.follow(engine.submit(request(prompt, **more))))
    if adapter:
        adapter.detach(base.model)
    return tokens


def merged(base, prompt, weights):
    """The answer of transformers with the update added to the weights."""
    model = base.model
    linears = {name: model.get_submodule(name) for name in weights.updates}
    before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    for name, update in weights.updates.items():
        delta = update.delta_OI()
        linears[name].weight.data += delta.t() if weights.is_transposed else delta
    answer = by_transformers(base, list(prompt), 12, set(STOP))
    for name, weight in before.items():
        linears[name].weight.data.copy_(weight)
    return answer


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mixed_batch_equals_single_runs_and_merged_weights(name):
    base = tiny_base(name)
    adapters = adapters_of(base)
    prompts = prompts_of([5, 1, 17, 9, 30, 2, 26, 12])
    chosen = [None, "a", "b", "c", "a", "b", None, "c"]
    expected = [alone(base, prompt, adapters.get(who)) for prompt, who in zip(prompts, chosen, strict=True)]
    with Engine(base, Limits(max_rows=5, tokens_per_step=16, max_seats=2)) as engine:
        for who, weights in adapters.items():
            engine.load(who, weights)
        rows = [engine.submit(request(p, who)) for p, who in zip(prompts, chosen, strict=True)]
        finish(engine)
        assert [row.tokens for row in rows] == expected
    by_merging = [
        merged(base, prompt, adapters[who]) if who else by_transformers(base, prompt, 12, set(STOP))
        for prompt, who in zip(prompts, chosen, strict=True)
    ]
    assert by_merging == expected
    assert len({tuple(tokens) for tokens in expected}) > 5


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_mixed_batch_equals_peft_with_adapter_names():
    base = tiny_base("llama")
    adapters = adapters_of(base)
    prompts = prompts_of([8] * 6)
    chosen = ["a", None, "b", "c", "b", "a"]
    with Engine(base) as engine:
        for who, weights in adapters.items():
            engine.load(who, weights)
        rows = [
            engine.submit(Request(prompt=tuple(p), adapter=who, max_new_tokens=10))
            for p, who in zip(prompts, chosen, strict=True)
        ]
        finish(engine)
    targets = sorted({name.rsplit(".", 1)[-1] for name in adapters["a"].updates})
    model = base.model
    model.set_attn_implementation("sdpa")
    for index, (who, weights) in enumerate(adapters.items()):
        config = peft.LoraConfig(r=RANKS[who], lora_alpha=0.5 * RANKS[who], target_modules=targets)
        if index == 0:
            model = peft.get_peft_model(model, config, adapter_name=f"adapter-{who}")
        else:
            model.add_adapter(f"adapter-{who}", config)
        for path, update in weights.updates.items():
            layer = model.base_model.model.get_submodule(path)
            layer.lora_A[f"adapter-{who}"].weight.data.copy_(update.a_RI)
            layer.lora_B[f"adapter-{who}"].weight.data.copy_(update.b_OR)
    ids = torch.tensor(prompts)
    output = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=[f"adapter-{who}" if who else "__base__" for who in chosen],
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=0,
    )
    assert output[:, 8:].tolist() == [row.tokens for row in rows]


def _random_compositions(name, num, seed):
    """Rows of random prompts and adapters that join and leave at random steps, under random limits."""
    random_ = random.Random(seed)
    base = tiny_base(name)
    adapters = adapters_of(base)
    prompts = prompts_of([1, 3, 6, 11, 18, 23, 25, 31])
    expected = {
        (place, who): alone(base, prompt, adapters.get(who))
        for place, prompt in enumerate(prompts)
        for who in (None, *adapters)
    }
    for _ in range(num):
        limits = Limits(
            max_rows=random_.randint(1, 7),
            tokens_per_step=random_.choice([1, 5, 16, 200]),
            max_seats=random_.randint(1, 3),
            cache_tokens=random_.choice([64, 200, 10_000]),
            prefix_cache_bytes=random_.choice([0, 20_000, 1 << 20]),
        )
        with Engine(base, limits) as engine:
            for who, weights in adapters.items():
                engine.load(who, weights)
            waiting = [random_.choice(list(expected)) for _ in range(random_.randint(1, 9))]
            rows = []
            while waiting or not engine.is_idle:
                while waiting and random_.random() < 0.6:
                    place, who = waiting.pop()
                    rows.append(((place, who), engine.submit(request(prompts[place], who))))
                engine.step()
            for key, row in rows:
                assert row.tokens == expected[key], (limits, key)
                assert row.state is State.FINISHED


@pytest.mark.parametrize("name", ["phi3", "phi3-longrope", "mistral"])
def test_answers_do_not_depend_on_the_composition_of_the_batch(name):
    _random_compositions(name, 12, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_answers_do_not_depend_on_500_random_compositions():
    _random_compositions("phi3", 300, seed=2)
    _random_compositions("phi3-longrope", 200, seed=3)


def test_1000_cancels_leave_no_slot_no_lease_and_no_row():
    base = tiny_base("phi3")
    random_ = random.Random(4)
    adapters = adapters_of(base)
    expected = alone(base, [5, 6, 7], adapters["a"])
    with Engine(base, Limits(max_rows=6, tokens_per_step=12, max_seats=2)) as engine:
        for who, weights in adapters.items():
            engine.load(who, weights)
        num_cancelled = 0
        while num_cancelled < 1000:
            rows = [
                engine.submit(request(prompts_of([random_.randint(1, 20)])[0], random_.choice("abc")))
                for _ in range(random_.randint(1, 20))
            ]
            for _ in range(random_.randint(0, 3)):
                engine.step()
            for row in random_.sample(rows, len(rows)):
                was_over = row.is_over
                engine.cancel(row)
                engine.cancel(row)
                num_cancelled += not was_over
                assert row.is_over
                assert row.slot == -1
        assert engine.is_idle
        assert (engine.num_running, engine.num_waiting) == (0, 0)
        assert not engine._leases
        assert engine._cache.capacity == 0
        assert all(not loaded.num_leases for loaded in engine._registry._by_name.values())
        assert list(engine.follow(engine.submit(request([5, 6, 7], "a")))) == expected


def test_an_adapter_unloaded_or_replaced_under_load_stays_with_its_rows():
    base = tiny_base("phi3")
    adapters = adapters_of(base)
    prompt = prompts_of([9])[0]
    old, new = (alone(base, prompt, adapters[who]) for who in "ab")
    with Engine(base, Limits(max_rows=2)) as engine:
        first = engine.load("mine", adapters["a"])
        running = engine.submit(request(prompt, "mine"))
        engine.step()
        assert engine.load("mine", adapters["b"]) > first
        later = engine.submit(request(prompt, "mine"))
        engine.step()
        engine.unload("mine")
        waits = [engine.submit(request(prompt)) for _ in range(2)]
        finish(engine)
        assert (running.tokens, later.tokens) == (old, new)
        assert all(row.state is State.FINISHED for row in waits)
        assert engine.adapters == []
        assert engine._registry.num_resident == 0


def test_a_request_that_waits_for_an_unloaded_adapter_fails_and_says_so():
    base = tiny_base("phi3")
    with Engine(base, Limits(max_rows=1)) as engine:
        engine.load("mine", adapters_of(base)["a"])
        engine.submit(request([3, 4]))
        engine.step()
        waits = engine.submit(request([3, 4], "mine"))
        engine.unload("mine")
        finish(engine)
        assert (waits.state, waits.reason) == (State.FAILED, "the adapter 'mine' was unloaded")


def test_a_cancel_frees_the_slot_for_the_next_step():
    base = tiny_base("phi3")
    with Engine(base, Limits(max_rows=1)) as engine:
        first, second = (engine.submit(request([3, 4], max_new_tokens=40)) for _ in range(2))
        engine.step()
        assert (first.state, second.state) == (State.RUNNING, State.WAITING)
        engine.cancel(first)
        engine.step()
        assert (first.state, second.state) == (State.CANCELLED, State.RUNNING)
        assert len(first.tokens) == 1


def test_a_deadline_ends_running_and_waiting_requests():
    base = tiny_base("phi3")
    with Engine(base, Limits(max_rows=1)) as engine:
        rows = [engine.submit(request([3], deadline=time.monotonic() + 1e6)) for _ in range(2)]
        engine.step()
        late = engine.submit(request([3], deadline=time.monotonic()))
        assert late in engine.step()
        assert (late.state, late.reason) == (State.CANCELLED, "deadline")
        finish(engine)
        assert all(row.state is State.FINISHED for row in rows)


def test_a_long_prompt_does_not_stop_the_rows_that_decode():
    base = tiny_base("phi3")
    with Engine(base, Limits(tokens_per_step=8)) as engine:
        quick = engine.submit(Request(prompt=(3, 4), max_new_tokens=30))
        engine.step()
        engine.submit(Request(prompt=tuple(prompts_of([40])[0]), max_new_tokens=2))
        for expected in range(2, 8):
            engine.step()
            assert len(quick.tokens) == expected


def test_adapters_take_turns_when_all_wait():
    base = tiny_base("phi3")
    with Engine(base, Limits(max_rows=1)) as engine:
        for who, weights in adapters_of(base).items():
            engine.load(who, weights)
        rows = [engine.submit(request([3], who, max_new_tokens=1)) for who in "aaabbc"]
        order = []
        while not engine.is_idle:
            order += [row for row in engine.step() if row.is_over]
        assert [rows.index(row) for row in order] == [0, 3, 5, 1, 4, 2]


def test_the_line_is_bounded():
    with Engine(tiny_base("phi3"), Limits(max_waiting=2)) as engine:
        for _ in range(2):
            engine.submit(request([3]))
        with pytest.raises(UserError, match="too many requests"):
            engine.submit(request([3]))


def test_a_common_beginning_is_computed_once_and_changes_nothing():
    base = tiny_base("phi3")
    weights = adapters_of(base)["a"]
    begin = prompts_of([30])[0]
    prompts = [[*begin, 5, 6], [*begin, 8], begin, [*begin[:20], 9]]
    expected = [alone(base, prompt, weights) for prompt in prompts]
    computed = []
    forward = Engine._forward

    class Counting(Engine):
        def _forward(self, ids, seats, spans, is_long):
            computed.append(sum(span.length for span in spans if span.position + span.length <= 32))
            return forward(self, ids, seats, spans, is_long)

    with Counting(base) as engine:
        engine.load("a", weights)
        for prompt, answer in zip(prompts, expected, strict=True):
            computed.clear()
            assert list(engine.follow(engine.submit(request(prompt, "a")))) == answer
            if prompt is not prompts[0]:
                assert computed[0] <= 3, "only what differs, and the last id"
        # Another adapter's keys are other numbers.
        computed.clear()
        assert list(engine.follow(engine.submit(request(prompts[0])))) == alone(base, prompts[0])
        assert computed[0] == len(prompts[0])


def test_the_same_seed_gives_the_same_text_beside_other_rows():
    base = tiny_base("phi3")
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=5)
    prompt = prompts_of([7])[0]
    expected = alone(base, prompt, sampling=sampling)
    with Engine(base, Limits(tokens_per_step=9)) as engine:
        others = [
            engine.submit(request(p, sampling=Sampling(temperature=1.0, seed=i)))
            for i, p in enumerate(prompts_of([4, 12, 20]))
        ]
        row = engine.submit(request(prompt, sampling=sampling))
        finish(engine)
    assert row.tokens == expected
    assert all(other.tokens for other in others)
    assert alone(base, prompt, sampling=Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=6)) != expected


def test_logprobs_are_those_of_the_model():
    base = tiny_base("phi3")
    prompt = prompts_of([6])[0]
    with Engine(base) as engine:
        row = engine.submit(request(prompt, sampling=Sampling(num_logprobs=3)))
        finish(engine)
    ids = torch.tensor([[*prompt, *row.tokens]])
    with base.plain_attention():
        logprobs = base.model(input_ids=ids).logits[0].log_softmax(dim=-1)
    for place, choice in enumerate(row.choices, start=len(prompt) - 1):
        assert choice.logprob == pytest.approx(float(logprobs[place, choice.token]), abs=1e-4)
        best = logprobs[place].topk(3)
        assert [token for token, _ in choice.top] == best.indices.tolist()
        assert [value for _, value in choice.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert len(row.choices) == len(row.tokens) > 0


@pytest.mark.parametrize("name", ["phi3", "phi3-longrope"])
def test_an_echoed_prompt_has_the_models_logprobs_however_it_is_read(name):
    base = tiny_base(name)
    prompt = prompts_of([23])[0]
    with base.plain_attention():
        logprobs = base.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
    expected = [float(logprobs[place - 1, prompt[place]]) for place in range(1, len(prompt))]
    for tokens_per_step in (4, 100):
        with Engine(base, Limits(tokens_per_step=tokens_per_step)) as engine:
            for _ in range(2):  # the second time a kept prefix must not swallow it
                row = engine.submit(request(prompt, echo=True, sampling=Sampling(num_logprobs=2)))
                finish(engine)
                assert [choice.token for choice in row.prompt_choices] == prompt[1:]
                assert [choice.logprob for choice in row.prompt_choices] == pytest.approx(expected, abs=1e-4)
                assert all(len(choice.top) == 2 for choice in row.prompt_choices)


def test_variants_of_a_request_are_different_texts_and_the_same_each_time():
    base = tiny_base("phi3")
    asked = request(prompts_of([6])[0], sampling=Sampling(temperature=1.5, seed=4)).variants(4)
    with Engine(base) as engine:
        rounds = []
        for _ in range(2):
            rows = [engine.submit(one) for one in asked]
            finish(engine)
            rounds.append([row.tokens for row in rows])
    assert rounds[0] == rounds[1]
    assert len({tuple(tokens) for tokens in rounds[0]}) == 4
    assert asked[0].sampling.seed == 4


def test_an_adapter_for_another_base_is_refused_and_nothing_has_changed():
    base, other = tiny_base("phi3"), tiny_base("llama")
    weights = adapters_of(base)["a"]
    with Engine(base) as engine:
        with pytest.raises(IncompatibleLowRankAdapter):
            engine.load("wrong", adapters_of(other)["a"])
        assert engine.adapters == []
        engine.load("right", weights)
        with pytest.raises(AdapterError, match="no adapter 'righ'") as caught:
            engine.submit(request([3], "righ"))
        assert caught.value.do == "did you mean 'right'?"


def test_a_model_with_an_attached_adapter_takes_no_others():
    base = tiny_base("phi3")
    weights = adapters_of(base)["a"]
    attach(base.model, LoraSettings(rank=2), seed=0)
    with Engine(base) as engine, pytest.raises(SettingsError, match="already has an adapter"):
        engine.load("a", weights)


def test_closing_gives_the_models_own_layers_back():
    base = tiny_base("gpt2")
    before = [(name, id(module)) for name, module in base.model.named_modules()]
    engine = Engine(base)
    engine.load("a", adapters_of(base)["a"])
    row = engine.submit(request([3], "a"))
    engine.step()
    engine.close()
    assert [(name, id(module)) for name, module in base.model.named_modules()] == before
    assert row.state is State.CANCELLED


def test_a_failure_of_the_computation_ends_its_rows_and_is_raised(monkeypatch):
    base = tiny_base("phi3")
    with Engine(base) as engine:
        row = engine.submit(request([3, 4]))
        monkeypatch.setattr(base.model.get_decoder().norm, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
        assert (row.state, row.reason) == (State.FAILED, "division by zero")
        assert engine.is_idle


def test_idle_adapters_make_room_and_are_read_again(tmp_path):
    from phinetune.lora.forms import write_adapter

    base = tiny_base("phi3")
    adapters = adapters_of(base)
    for who, weights in adapters.items():
        write_adapter(weights, tmp_path / who, "peft")
    expected = {who: alone(base, [4, 5, 6], weights) for who, weights in adapters.items()}
    with Engine(base, Limits(max_seats=1, max_resident=1)) as engine:
        for who in adapters:
            engine.load(who, tmp_path / who)
        assert engine._registry.num_resident == 1
        for who in "abcab":
            assert list(engine.follow(engine.submit(request([4, 5, 6], who)))) == expected[who]
            assert engine._registry.num_resident == 1


@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_while_one_adapter_lives_alone_its_weights_are_merged_and_nothing_else_changes(name):
    base = tiny_base(name)
    adapters = adapters_of(base)
    prompts = prompts_of([5, 17, 9])
    expected = {who: [alone(base, p, weights) for p in prompts] for who, weights in adapters.items()}
    plain = [alone(base, prompt, None) for prompt in prompts]

    def answers(engine, who):
        rows = [engine.submit(request(prompt, who)) for prompt in prompts]
        finish(engine)
        return [row.tokens for row in rows]

    with Engine(base, Limits(merged_bytes=1 << 30)) as engine:
        engine.load("a", adapters["a"])
        assert answers(engine, "a") == expected["a"]
        mix = engine._layers.mix
        assert mix.is_merged
        assert answers(engine, None) == plain  # the base's rows go past what is merged
        assert not mix.is_merged
        engine.load("b", adapters["b"])
        assert not mix.merged_seat
        assert answers(engine, "b") == expected["b"]
        assert answers(engine, "a") == expected["a"]
        engine.unload("a")
        assert answers(engine, "b") == expected["b"]
        assert mix.is_merged
        engine.load("b", adapters["c"])
        assert answers(engine, "b") == expected["c"]
    with Engine(base, Limits(merged_bytes=10)) as engine:
        engine.load("a", adapters["a"])
        assert answers(engine, "a") == expected["a"]
        assert not engine._layers.mix.merged_seat
