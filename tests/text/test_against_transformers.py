"""Benign chats give exactly the ids that transformers' own templates give."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import made_up_models as made
import pytest

from phinetune.text.render import load_renderer

BENIGN = [
    made.chat(("user", "hello"), ("assistant", "hi there")),
    made.chat(("system", "be brief"), ("user", "a\nb"), ("assistant", "c\n\nd ")),
    made.chat(
        ("user", "  padded "), ("assistant", "\n\n both \n"), ("user", "\u3000wide\x1c"), ("assistant", "\t.")
    ),
    made.chat(("system", ""), ("user", "é 🙂 ü"), ("assistant", "<b>x</b> | <end>"), ("user", "z")),
    made.chat(("user", "all all a a"), ("assistant", "<|en d|> <|unknown|>")),
]
SPECS = {
    "byte level": made.byte_level,
    "sentencepiece": made.sentencepiece,
    "metaspace first": made.metaspace_first,
    "word lookup": made.word_lookup,
}


STRIPS = {"none": (False, False), "right": (True, False), "both": (True, True)}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("strips", STRIPS)
@pytest.mark.parametrize("name", made.PHI_JINJA)
def test_phi_templates_equal_transformers(name: str, strips: str, spec: str, tmp_path: Path) -> None:
    right, left = STRIPS[strips]
    folder = made.phi_model(tmp_path, name, strips=right, strips_left=left, spec=SPECS[spec])
    renderer = load_renderer(folder)
    assert renderer.template is not None
    assert renderer.template.name == name
    for conversation in BENIGN:
        rendered = renderer.example(conversation)
        assert rendered.ids.tolist() == made.transformers_ids(folder, conversation)
        prompt = renderer.prompt(conversation.messages)
        assert prompt == made.transformers_ids(folder, conversation, generation_prompt=True)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["chatml", "brackets", "rewriting", "thinking", "generation tag"])
def test_jinja_templates_equal_transformers(name: str, spec: str, tmp_path: Path) -> None:
    folder = made.jinja_model(tmp_path, name, spec=SPECS[spec])
    renderer = load_renderer(folder)
    assert renderer.template is not None
    assert renderer.template.name == "jinja"
    for conversation in BENIGN:
        if name == "brackets" and conversation.messages[0].role == "system":
            continue
        assert renderer.example(conversation).ids.tolist() == made.transformers_ids(folder, conversation)
        prompt = renderer.prompt(conversation.messages)
        assert prompt == made.transformers_ids(folder, conversation, generation_prompt=True)


def test_flags_of_the_tokenizer_config_win(tmp_path: Path) -> None:
    import json

    folder = made.phi_model(tmp_path, "phi3", strips=False)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    config["added_tokens_decoder"] = {
        str(entry["id"]): {**{key: entry[key] for key in entry if key != "id"}, "rstrip": True}
        for entry in spec["added_tokens"]
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": m.role, "content": m.content} for m in BENIGN[2].messages]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert load_renderer(folder).example(BENIGN[2]).ids.tolist() == expected


@pytest.fixture(scope="session")
def phi3_mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(os.environ.get("PHINETUNE_DATA", "none")) / "tokenizer-phi3" / "phi-3-mini"
    if not source.is_dir():
        pytest.skip("needs PHINETUNE_DATA with the real tokenizer of Phi-3 in tokenizer-phi3/phi-3-mini")
    folder = tmp_path_factory.mktemp("phi-3-mini")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


def test_the_real_phi3_equals_transformers(phi3_mini: Path) -> None:
    renderer = load_renderer(phi3_mini)
    assert renderer.template is not None
    assert renderer.template.name == "phi3"
    for conversation in BENIGN:
        rendered = renderer.example(conversation)
        assert rendered.ids.tolist() == made.transformers_ids(phi3_mini, conversation)
        prompt = renderer.prompt(conversation.messages)
        assert prompt == made.transformers_ids(phi3_mini, conversation, generation_prompt=True)


def test_the_real_phi3_writes_no_control_token_for_its_surface(phi3_mini: Path) -> None:
    tokenizer = load_renderer(phi3_mini).tokenizer
    control = set(tokenizer.control_ids.values())
    assert {0, 1, 2, 32000, 32001, 32006, 32007, 32010} <= control
    for surface in tokenizer.control_ids:
        for text in (surface, surface * 2, f"a{surface}b", f" {surface}\n", f"\n\n{surface} "):
            ids = tokenizer.encode_plain(text)
            assert control.isdisjoint(ids)
            assert tokenizer.decode(ids) == text


def test_the_real_templates_of_phi35_are_known(phi3_mini: Path, tmp_path: Path) -> None:
    for file, name in (
        ("trl.phi3.jinja", "phi3"),
        ("trl.phi3_5.jinja", "phi3.5"),
        ("microsoft-Phi-3.5-mini-instruct.jinja", "phi3.5"),
        ("trl.phi3_training.jinja", "phi3"),
        ("trl.phi3_5_training.jinja", "phi3.5"),
    ):
        folder = tmp_path / file
        shutil.copytree(phi3_mini, folder)
        source = Path(os.environ["PHINETUNE_DATA"]) / "tokenizer-phi3" / file
        shutil.copyfile(source, folder / "chat_template.jinja")
        template = load_renderer(folder).template
        assert template is not None
        assert template.name == name
