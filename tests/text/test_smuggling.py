"""Whatever people write, it can never become a control token."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import made_up_models as made
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.base.errors import DataError
from phinetune.data.conversation import Conversation, Message
from phinetune.text.render import Renderer, load_renderer

SURFACES = [made.END_OF_TEXT, "<|bos|>", *made.PHI_ROLES, *made.IM_TOKENS, "<unk>", "<s>", "</s>"]
SPECS = {
    "byte level": made.byte_level,
    "sentencepiece": made.sentencepiece,
    "metaspace first": made.metaspace_first,
    "unigram": made.unigram,
    "word lookup": made.word_lookup,
}
PHI = [("phi", name, spec) for name in made.PHI_JINJA for spec in SPECS]
JINJA = [("jinja", name, spec) for name in ("chatml", "brackets", "thinking") for spec in SPECS]

_fragments = st.sampled_from(SURFACES) | st.sampled_from(
    ["<|", "|>", "<|en", "d|>", " ", "\n", "&", "{{", "%}"]
)
_texts = st.lists(_fragments | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=6)
texts = _texts.map("".join)


@cache
def renderer(kind: str, name: str, spec: str) -> Renderer:
    folder = Path(mkdtemp(prefix="phinetune-"))
    make = made.phi_model if kind == "phi" else made.jinja_model
    return load_renderer(make(folder, name, spec=SPECS[spec]))


def control_counts(renderer: Renderer, ids: list[int]) -> Counter[int]:
    return Counter(id_ for id_ in ids if renderer.tokenizer.is_control(id_))


def with_contents(roles: list[str], contents: list[str]) -> list[Message]:
    return [
        Message(role=role, content=content)  # type: ignore[arg-type]
        for role, content in zip(roles, contents, strict=True)
    ]


@pytest.mark.parametrize("spec", SPECS)
def test_a_surface_in_text_is_only_letters(spec: str) -> None:
    tokenizer = renderer("phi", "phi3", spec).tokenizer
    control = set(tokenizer.control_ids.values())
    for surface in tokenizer.control_ids:
        for text in (
            surface,
            surface * 2,
            f"a{surface}b",
            f" {surface} ",
            f"\n{surface}\n",
            f"{surface} {surface}",
        ):
            assert control.isdisjoint(tokenizer.encode_plain(text))
            after = tokenizer.encode_many([text], is_start=False, with_positions=True)[0]
            assert control.isdisjoint(after.ids)
            assert len(after.positions) == len(after.ids)


@pytest.mark.parametrize("spec", SPECS)
@given(text=texts)
def test_text_never_gives_a_control_id(spec: str, text: str) -> None:
    tokenizer = renderer("phi", "phi3", spec).tokenizer
    assert set(tokenizer.control_ids.values()).isdisjoint(tokenizer.encode_plain(text))


@pytest.mark.parametrize(("kind", "name", "spec"), PHI + JINJA)
@settings(max_examples=25)  # for each of 35 models
@given(contents=st.lists(texts, min_size=4, max_size=4))
def test_control_tokens_come_from_roles_alone(kind: str, name: str, spec: str, contents: list[str]) -> None:
    one = renderer(kind, name, spec)
    roles = ["user", "assistant"] * 2 if name == "brackets" else ["system", "user", "assistant", "user"]
    # A blank system message may be left out by the template, and a blank turn says nothing.
    contents = [content if content.strip() else "x" for content in contents]
    plain = one.prompt(with_contents(roles, ["x"] * 4))
    assert control_counts(one, one.prompt(with_contents(roles, contents))) == control_counts(one, plain)


@pytest.mark.parametrize(("kind", "name", "spec"), PHI + JINJA)
def test_a_surface_split_over_two_messages_stays_text(kind: str, name: str, spec: str) -> None:
    one = renderer(kind, name, spec)
    roles = ["user", "assistant", "user"]
    plain = control_counts(one, one.prompt(with_contents(roles, ["x"] * 3)))
    for surface in SURFACES:
        for cut in range(1, len(surface)):
            split = one.prompt(with_contents(roles, [surface[:cut], surface[cut:], surface]))
            assert control_counts(one, split) == plain


def test_a_rewriting_template_refuses_surfaces(tmp_path: Path) -> None:
    one = load_renderer(made.jinja_model(tmp_path, "rewriting"))
    assert one.example(made.chat(("user", "a & b"), ("assistant", "c & d"))).num_trained
    # Where nothing is rewritten, the letters are as safe as with any other template.
    safe = one.example(made.chat(("user", "<|im_end|>"), ("assistant", "c")))
    end = one.tokenizer.control_ids["<|im_end|>"]
    assert safe.ids.tolist().count(end) == 2
    with pytest.raises(DataError, match="the text holds") as caught:
        one.example(made.chat(("user", "& <|im_end|>"), ("assistant", "c")))
    assert "<|im_end|>" in caught.value.what


def test_a_template_that_makes_control_tokens_is_refused(tmp_path: Path) -> None:
    spec = made.byte_level([made.END_OF_TEXT, "<|im_start|>", "<|im_end|>"])
    template = made.OTHER_JINJA["rewriting"].replace("'and'", "''")
    folder = made.write_model(tmp_path, spec, template=template, eos_token=made.END_OF_TEXT)
    with pytest.raises(DataError, match="makes control tokens"):
        load_renderer(folder).example(made.chat(("user", "<|im_&end|>"), ("assistant", "c")))


def test_a_character_that_would_become_a_control_token_is_refused(tmp_path: Path) -> None:
    spec = made.unigram([made.END_OF_TEXT])
    spec["model"]["unk_id"] = 1
    folder = made.write_model(tmp_path, spec, template=None, eos_token=made.END_OF_TEXT)
    tokenizer = load_renderer(folder).tokenizer
    assert tokenizer.encode_plain("abc")
    with pytest.raises(DataError, match="no token for a character"):
        tokenizer.encode_plain("a§c")


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_half_a_character_is_refused_with_its_row(text: str) -> None:
    one = renderer("phi", "phi3", "byte level")
    good = made.chat(("user", "a"), ("assistant", "b"))
    bad = Conversation(messages=made.chat(("user", text), ("assistant", "b")).messages, source=good.source)
    with pytest.raises(DataError, match="half a character") as caught:
        one.examples([good, bad])
    assert caught.value.where == "train.json:7"
