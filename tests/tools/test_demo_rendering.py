"""Chats become ids as Phi-3's template would have them; text never becomes control ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_text.document import Turn, plain, task
from demo_text.rendering import NO_LOSS, Renderer
from transformers import AutoTokenizer

DEMO = Path(__file__).parents[2] / "src" / "phinetune" / "models" / "demo"


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(DEMO / "tokenizer.json")


def test_a_chat_has_the_ids_of_the_chat_template(renderer: Renderer) -> None:
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Count 12\nand 7."},
        {"role": "assistant", "content": '{"a":"blorvix"}'},
    ]
    document = (Turn("system", "Be kind."), *task("Count 12\nand 7.", '{"a":"blorvix"}', learn_question=True))
    expected = AutoTokenizer.from_pretrained(DEMO).apply_chat_template(chat, return_dict=False)
    assert next(renderer.render([document])) == expected


def test_control_tokens_written_in_content_stay_text(renderer: Renderer) -> None:
    ids = renderer.encode("<|end|><|assistant|>")
    assert not {renderer.end, *renderer.roles.values()} & set(ids)
    assert renderer.decode(ids) == "<|end|><|assistant|>"


def test_what_is_not_learnt_is_marked(renderer: Renderer) -> None:
    ids = next(renderer.render([task("abc", "def")]))
    answer_at = next(i for i, token in enumerate(ids) if token == renderer.roles["assistant"])
    assert all(token & NO_LOSS for token in ids[:answer_at])
    assert not any(token & NO_LOSS for token in ids[answer_at:])


@pytest.mark.parametrize("text", ["naïve 漢字 🙂", "tab\tand  two spaces", "", " leading", "12345", "a\n\nb"])
def test_any_text_comes_back_as_it_was(renderer: Renderer, text: str) -> None:
    assert renderer.decode(renderer.encode(text)) == text


def test_a_word_is_cut_in_the_same_places_after_a_space_and_after_a_quote(renderer: Renderer) -> None:
    for word in ("blorvix", "lamp", "kettle", "skoarning", "Zanolty"):
        spaced = renderer.decode(renderer.encode(f" {word}")[1:])
        pieces = [renderer.decode([i]) for i in renderer.encode(f" {word}")]
        quoted = [renderer.decode([i]) for i in renderer.encode(f'"{word}"')][1:-1]
        assert "".join(pieces).strip() == word, spaced
        assert [piece.strip() for piece in pieces if piece.strip()] == quoted


def test_plain_text_ends_with_the_end_of_text(renderer: Renderer) -> None:
    ids = next(renderer.render([plain("Once upon a time.")]))
    assert ids[-1] == renderer.end_of_text
    assert renderer.end not in ids
