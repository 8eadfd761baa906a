"""Constrained answers parse and follow their schema, whoever answers and whatever is asked."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from phinetune.base.errors import UserError
from phinetune.data.conversation import Message
from phinetune.generation.constraints import Grammars
from phinetune.generation.engine import Engine
from phinetune.generation.request import Request
from phinetune.generation.sampling import Sampling
from phinetune.models.loading import load_base
from phinetune.text.render import load_renderer

from .random_adapters import random_adapter


@pytest.fixture(scope="module")
def demo():
    base = load_base("demo", device_name="cpu", dtype="float32")
    renderer = load_renderer(base.folder)
    grammars = Grammars(renderer.tokenizer, vocab_size=base.vocab_size, stop_ids=renderer.stop_ids)
    return base, renderer, grammars


def random_schema(random_: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose answers end: every text and list is bounded."""
    kinds = ["text", "choice", "number", "truth", "constant"] + (["object", "list"] if depth < 2 else [])
    kind = "object" if depth == 0 else random_.choice(kinds)
    if kind == "text":
        return {"type": "string", "maxLength": random_.randint(1, 8)}
    if kind == "choice":
        return {"enum": random_.sample(["red", "green", "a b", "ü", '"', 3, None], 3)}
    if kind == "number":
        low = random_.randint(-5, 5)
        return {"type": "integer", "minimum": low, "maximum": low + random_.randint(0, 90)}
    if kind == "truth":
        return {"type": "boolean"}
    if kind == "constant":
        return {"const": random_.choice([1, "x", [2]])}
    if kind == "list":
        return {"type": "array", "items": random_schema(random_, depth + 1), "minItems": 1, "maxItems": 2}
    names = random_.sample(["name", "order", "size", "kind", "é"], random_.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: random_schema(random_, depth + 1) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def follows(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is one that `random_schema`'s schema accepts."""
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return bool(value == schema["const"])
    match schema["type"]:
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "integer":
            return isinstance(value, int) and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "array":
            return 1 <= len(value) <= 2 and all(follows(entry, schema["items"]) for entry in value)
    parts = schema["properties"]
    return set(value) == set(parts) and all(follows(value[name], part) for name, part in parts.items())


def answers(demo, schemas, *, seed):
    base, renderer, grammars = demo
    random_ = random.Random(seed)
    adapters = {name: random_adapter(base.model, rank=4, seed=ord(name)) for name in "ab"}
    with Engine(base) as engine:
        for name, weights in adapters.items():
            engine.load(name, weights)
        rows = []
        for number, schema in enumerate(schemas):
            prompt = renderer.prompt([Message(role="user", content=f"Fill in form {number}")])
            sampling = Sampling(temperature=random_.choice([0.0, 1.0]), seed=number)
            grammar = grammars.json_schema(schema)
            rows.append(
                engine.submit(
                    Request(
                        prompt=tuple(prompt),
                        max_new_tokens=600,
                        adapter=random_.choice([None, "a", "b"]),
                        sampling=sampling,
                        stop_ids=renderer.stop_ids,
                        grammar=grammar,
                    )
                )
            )
        while not engine.is_idle:
            engine.step()
        assert {row.reason for row in rows} == {"stop"}
        return [renderer.decode(row.tokens) for row in rows]


def test_answers_to_200_random_schemas_parse_and_follow_them(demo):
    random_ = random.Random(1)
    schemas = [random_schema(random_) for _ in range(200)]
    for text, schema in zip(answers(demo, schemas, seed=1), schemas, strict=True):
        assert follows(json.loads(text), schema), (text, schema)


def test_a_schema_that_is_none_is_refused(demo):
    with pytest.raises(UserError, match="schema cannot be used") as caught:
        demo[2].json_schema({"type": "no such type"})
    assert caught.value.why


def test_an_object_is_an_object(demo):
    base, renderer, grammars = demo
    prompt = renderer.prompt([Message(role="user", content="Say something")])
    with Engine(base) as engine:
        row = engine.submit(
            Request(
                prompt=tuple(prompt),
                max_new_tokens=400,
                stop_ids=renderer.stop_ids,
                grammar=grammars.json_object(),
            )
        )
        while not engine.is_idle:
            engine.step()
    text = renderer.decode(row.tokens)
    assert text.lstrip().startswith("{")
    if row.reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_a_choice_is_one_of_its_texts_to_the_letter(demo):
    base, renderer, grammars = demo
    texts = ["transfer", "transfer money", 'say "hi"\\n', "ünder", "a\nb", "pin_change"]
    prompt = tuple(renderer.prompt([Message(role="user", content="I lost my card")]))
    found = set()
    with Engine(base) as engine:
        rows = [
            engine.submit(
                Request(
                    prompt=prompt,
                    max_new_tokens=40,
                    stop_ids=renderer.stop_ids,
                    sampling=Sampling(temperature=3.0, seed=seed),
                    grammar=grammars.choice(texts),
                )
            )
            for seed in range(12)
        ]
        while not engine.is_idle:
            engine.step()
    for row in rows:
        assert row.reason == "stop"
        found.add(renderer.decode(row.tokens))
    assert found <= set(texts)
    assert len(found) > 1


@pytest.mark.parametrize("texts", [[], ["a", ""]])
def test_a_choice_needs_texts(demo, texts):
    with pytest.raises(UserError, match="answers to choose from"):
        demo[2].choice(texts)
