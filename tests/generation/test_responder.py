"""Answers as text: no half characters, no stop strings, from any thread, and every slot is freed."""

from __future__ import annotations

import random
import threading
import time

import pytest

from phinetune.base.errors import UserError
from phinetune.data.conversation import Message
from phinetune.generation.engine import Engine
from phinetune.generation.request import Request
from phinetune.generation.responder import Responder
from phinetune.generation.sampling import Sampling
from phinetune.models.loading import load_base
from phinetune.text.render import load_renderer


@pytest.fixture(scope="module")
def demo():
    base = load_base("demo", device_name="cpu", dtype="float32")
    return base, load_renderer(base.folder)


@pytest.fixture
def responder(demo):
    with Responder(Engine(demo[0]), demo[1]) as found:
        yield found


def request(responder, text, **more):
    ids = responder.renderer.prompt([Message(role="user", content=text)])
    values = {"max_new_tokens": 40, "sampling": Sampling(temperature=1.0, seed=len(text)), **more}
    return Request(prompt=tuple(ids), stop_ids=responder.renderer.stop_ids, **values)


def test_pieces_joined_are_the_decoded_tokens(responder):
    response = responder.respond(request(responder, "Tell me a story"))
    assert "".join(response) == response.text() == responder.renderer.decode(response.row.tokens)
    assert response.reason in ("stop", "length")
    assert response.usage.num_new_tokens == len(response.row.tokens)


def test_pieces_never_hold_half_a_character(responder, monkeypatch):
    text = "naïve — 日本語 🙂 done".encode()
    monkeypatch.setattr(
        responder.renderer, "decode", lambda ids: bytes(i % 256 for i in ids).decode(errors="replace")
    )
    script = iter(text)

    def scripted(rows, logits):
        for row in list(rows):
            byte = next(script, None)
            if byte is None:
                responder.engine.cancel(row, "stop")
            else:
                row.tokens.append(byte)

    monkeypatch.setattr(responder.engine, "_choose", scripted)
    pieces = list(responder.respond(request(responder, "x", max_new_tokens=200)))
    assert "".join(pieces) == text.decode()
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stop_string_ends_the_answer_before_it_shows(responder):
    whole = responder.respond(request(responder, "Tell me a story")).text()
    stop = whole[len(whole) // 2 :][:3]
    response = responder.respond(request(responder, "Tell me a story"), stop=[stop])
    assert response.text() == whole[: whole.index(stop)]
    assert response.reason == "stop"
    assert responder.engine.is_idle


def test_many_threads_ask_at_once(responder):
    asked = [f"Question {i} about {'x' * (i % 7)}" for i in range(24)]
    expected = [responder.respond(request(responder, text)).text() for text in asked]
    found = {}

    def ask(text):
        found[text] = "".join(responder.respond(request(responder, text)))

    threads = [threading.Thread(target=ask, args=(text,)) for text in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[text] for text in asked] == expected


def test_leaving_a_stream_cancels_it(responder):
    random_ = random.Random(0)
    for _ in range(30):
        response = responder.respond(request(responder, "Tell me a story", max_new_tokens=500))
        for number, _ in enumerate(response):
            if number >= random_.randint(0, 3):
                break
        assert response.is_over
        assert response.reason in ("cancelled", "stop")
    assert responder.engine.is_idle


def test_closing_ends_what_runs(demo):
    responder = Responder(Engine(demo[0]), demo[1])
    response = responder.respond(request(responder, "Tell me a story", max_new_tokens=1500))
    responder.close()
    assert response.text() is not None
    assert response.reason in ("cancelled", "stop")


def test_a_failed_step_fails_its_answers_and_the_next_one_works(responder, monkeypatch):
    engine = responder.engine
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda *_: 1 / 0)
    response = responder.respond(request(responder, "Hello"))
    assert response.text() == ""
    assert response.is_failed
    assert response.reason == "division by zero"
    monkeypatch.setattr(engine, "_forward", forward)
    assert responder.respond(request(responder, "Hello")).text()


def test_a_prompt_that_does_not_fit_is_refused_at_once(responder):
    with pytest.raises(UserError, match="does not fit"):
        responder.respond(Request(prompt=(5,) * 100_000, max_new_tokens=1))


def test_an_answer_of_no_tokens_is_over_at_once(responder):
    began = time.monotonic()
    assert responder.respond(request(responder, "Hello", max_new_tokens=0)).text() == ""
    assert time.monotonic() - began < 5
