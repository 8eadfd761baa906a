"""Text of a token stream: whole characters only, and nothing lost or said twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from phinetune.generation.text_stream import REPLACEMENT, TextStream, text_pieces

MARK = "\u2581"


def byte_level() -> Tokenizer:
    """One token per byte, as GPT-2 and the Phi-4 family fall back to for rare characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def llama_like() -> Tokenizer:
    """Words with a space mark, bytes for the rest; the first space is stripped, as Llama and Phi-3 do."""
    words = [MARK + "a", MARK + "bird", "b", "c", MARK, "é"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {
        word: 256 + index for index, word in enumerate(words)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_LEVEL, LLAMA_LIKE = byte_level(), llama_like()


def llama_ids(text: str) -> list[int]:
    ids: list[int] = []
    for character in text:
        known = LLAMA_LIKE.token_to_id(MARK if character == " " else character)
        ids += [known] if known is not None else list(character.encode())
    return ids


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters=REPLACEMENT, exclude_categories=("Cs",)), max_size=30))
@pytest.mark.parametrize("name", ["byte-level", "llama-like"])
def test_pieces_joined_are_the_text_and_hold_whole_characters(name, text):
    tokenizer, ids = (
        (BYTE_LEVEL, BYTE_LEVEL.encode(text).ids) if name == "byte-level" else (LLAMA_LIKE, llama_ids(text))
    )
    pieces = list(text_pieces(ids, tokenizer.decode))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_of_four_bytes_comes_in_one_piece():
    ids = BYTE_LEVEL.encode("x🦉y").ids
    assert list(text_pieces(ids, BYTE_LEVEL.decode)) == ["x", "🦉", "y"]


def test_spaces_between_words_survive_a_decoder_that_strips_the_first():
    ids = [LLAMA_LIKE.token_to_id(MARK + "a"), LLAMA_LIKE.token_to_id(MARK + "bird")]
    assert list(text_pieces(ids, LLAMA_LIKE.decode)) == ["a", " bird"]


def test_half_a_character_at_the_end_is_shown_as_such_not_lost():
    stream = TextStream(BYTE_LEVEL.decode)
    ids = BYTE_LEVEL.encode("ok🦉").ids[:-1]
    assert "".join(stream.push(token) for token in ids) == "ok"
    assert REPLACEMENT in stream.finish()
    assert stream.finish() == ""


def test_ids_without_text_give_no_piece():
    assert list(text_pieces([1, 2, 3], lambda ids: "".join("a" for token in ids if token == 3))) == ["a"]
