"""Rendering: which tokens an example has, which of them are trained, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import made_up_models as made
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.base.errors import DataError, ModelError
from phinetune.data.conversation import Message, PlainText, Source
from phinetune.models.catalog import demo_folder
from phinetune.text.render import Rendered, Renderer, load_renderer
from phinetune.text.tokenizer import WHITE_SPACE

SOURCE = Source(file="train.txt", line=3)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return load_renderer(made.phi_model(tmp_path_factory.mktemp("phi3"), "phi3"))


def spelt(renderer: Renderer, rendered: Rendered) -> tuple[str, str]:
    """All tokens and the trained ones, as text with control tokens."""
    decode = renderer.tokenizer.decode
    trained = rendered.ids[rendered.trained].tolist()
    return decode(rendered.ids.tolist(), keep_control=True), decode(trained, keep_control=True)


CHAT = made.chat(
    ("system", "be brief"), ("user", " hi\n"), ("assistant", "\nhello a\n"), ("user", "x"), ("assistant", "y")
)


def test_types_and_counts(phi3: Renderer) -> None:
    rendered = phi3.example(CHAT)
    assert rendered.ids.dtype == np.int32
    assert rendered.trained.dtype == np.bool_
    assert rendered.ids.shape == rendered.trained.shape == (rendered.num_tokens,)
    assert rendered.num_trained == int(rendered.trained.sum())
    assert rendered.source == CHAT.source


SPELT = {
    "phi3": (
        "<|system|>be brief<|end|><|user|>hi\n<|end|><|assistant|>hello a\n<|end|><|user|>x<|end|>"
        "<|assistant|>y<|end|><|endoftext|>",
        "hello a\n<|end|>y<|end|>",
    ),
    "phi4-mini": (
        "<|system|>be brief<|end|><|user|>hi\n<|end|><|assistant|>hello a\n<|end|><|user|>x<|end|>"
        "<|assistant|>y<|end|><|endoftext|>",
        "hello a\n<|end|>y<|end|>",
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>be brief<|im_end|><|im_start|>user<|im_sep|> hi\n<|im_end|>"
        "<|im_start|>assistant<|im_sep|>\nhello a\n<|im_end|><|im_start|>user<|im_sep|>x<|im_end|>"
        "<|im_start|>assistant<|im_sep|>y<|im_end|>",
        "\nhello a\n<|im_end|>y<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", SPELT)
def test_answers_and_their_end_are_trained(name: str, tmp_path: Path) -> None:
    renderer = load_renderer(made.phi_model(tmp_path, name))
    rendered = renderer.example(CHAT)
    assert spelt(renderer, rendered) == SPELT[name]
    assert not rendered.trained[0]


JINJA_TRAINED = {
    "chatml": "\nhello a\n<|im_end|>y<|im_end|>",
    "brackets": " hello a<|endoftext|> y<|endoftext|>",
    "rewriting": "\nhello a\n<|im_end|>y<|im_end|>",
    "thinking": "<think></think>\nhello a\n<|im_end|><think></think>y<|im_end|>",
    "generation tag": "\nhello a\n<|im_end|>y<|im_end|>",
}


@pytest.mark.parametrize("name", JINJA_TRAINED)
def test_jinja_trains_what_follows_the_prompt(name: str, tmp_path: Path) -> None:
    renderer = load_renderer(made.jinja_model(tmp_path, name))
    turns = made.chat(*[(m.role, m.content) for m in CHAT.messages[1:]])
    rendered = renderer.example(turns)
    assert spelt(renderer, rendered)[1] == JINJA_TRAINED[name]
    prompt = renderer.prompt(turns.messages[:1])
    assert rendered.ids.tolist()[: len(prompt)] == prompt
    assert not rendered.trained[: len(prompt)].any()
    assert rendered.trained[len(prompt)]


def test_jinja_finds_the_answer_in_rewritten_text(tmp_path: Path) -> None:
    renderer = load_renderer(made.jinja_model(tmp_path, "rewriting"))
    rendered = renderer.example(
        made.chat(("user", "a & b"), ("assistant", "c & d"), ("user", "&"), ("assistant", "&"))
    )
    assert spelt(renderer, rendered)[1] == "c and d<|im_end|>and<|im_end|>"


@pytest.mark.parametrize("strips", [True, False])
def test_the_line_break_of_a_header_is_not_trained(strips: bool, tmp_path: Path) -> None:
    renderer = load_renderer(made.phi_model(tmp_path, "phi3", strips=strips))
    rendered = renderer.example(made.chat(("user", "a"), ("assistant", "b")))
    assert spelt(renderer, rendered)[1] == "b<|end|>"
    prompt = renderer.prompt([Message(role="user", content="a")])
    assert rendered.ids.tolist()[: len(prompt)] == prompt


def test_weight_0_is_read_and_not_trained(phi3: Renderer) -> None:
    turns = (("user", "a"), ("assistant", "b", 0), ("user", "c"), ("assistant", "d"))
    weighted, plain = made.chat(*turns), made.chat(*[turn[:2] for turn in turns])  # type: ignore[misc]
    assert phi3.example(weighted).ids.tolist() == phi3.example(plain).ids.tolist()
    assert spelt(phi3, phi3.example(weighted))[1] == "d<|end|>"


def test_loss_on_all_trains_all_but_the_first(phi3: Renderer) -> None:
    rendered = phi3.example(CHAT, loss_on="all")
    assert not rendered.trained[0]
    assert rendered.trained[1:].all()
    assert rendered.ids.tolist() == phi3.example(CHAT).ids.tolist()


def test_plain_text_is_all_trained_and_ends(phi3: Renderer) -> None:
    rendered = phi3.example(PlainText(text="hello <|end|>", source=SOURCE))
    assert rendered.ids.tolist()[:-1] == phi3.tokenizer.encode_plain("hello <|end|>")
    assert rendered.ids[-1] == phi3.tokenizer.control_ids["<|endoftext|>"]
    assert not rendered.trained[0]
    assert rendered.trained[1:].all()


def test_plain_text_begins_as_the_tokenizer_wants(tmp_path: Path) -> None:
    spec = made.byte_level(["<|endoftext|>", "<|bos|>"])
    bos = spec["added_tokens"][1]["id"]
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [bos], "tokens": ["<|bos|>"]}},
    }
    folder = made.write_model(tmp_path, spec, template=None, eos_token="<|endoftext|>", bos_token="<|bos|>")
    renderer = load_renderer(folder)
    assert spelt(renderer, renderer.example(PlainText(text="a", source=SOURCE)))[0] == "<|bos|>a<|endoftext|>"


def test_a_system_prompt_replaces_that_of_the_data(phi3: Renderer) -> None:
    for conversation in (CHAT, made.chat(*[(m.role, m.content) for m in CHAT.messages[1:]])):
        text, _ = spelt(phi3, phi3.example(conversation, system_prompt="new"))
        assert text.startswith("<|system|>new<|end|><|user|>")
        assert text.count("<|system|>") == 1
    ids = phi3.prompt(CHAT.messages, system_prompt="new")
    assert phi3.tokenizer.decode(ids, keep_control=True).startswith("<|system|>new<|end|>")


def test_a_prompt_ends_with_the_header(phi3: Renderer) -> None:
    ids = phi3.prompt([Message(role="user", content="hi")])
    assert phi3.tokenizer.decode(ids, keep_control=True) == "<|user|>hi<|end|><|assistant|>"


def test_split_takes_the_last_answer(phi3: Renderer) -> None:
    messages, reference = phi3.split(CHAT)
    assert (messages, reference) == (CHAT.messages[:4], "y")
    with pytest.raises(DataError):
        phi3.split(PlainText(text="a", source=SOURCE))
    with pytest.raises(DataError):
        phi3.split(made.chat(("user", "a")))


def test_decode_leaves_control_tokens_out(phi3: Renderer) -> None:
    rendered = phi3.example(made.chat(("user", "hé"), ("assistant", "🙂")))
    assert phi3.decode(rendered.ids.tolist()) == "hé🙂"


def test_stop_ids_join_all_that_can_end_an_answer(tmp_path: Path) -> None:
    folder = made.phi_model(tmp_path, "phi3")
    (folder / "config.json").write_text('{"eos_token_id": 5}', "utf-8")
    (folder / "generation_config.json").write_text('{"eos_token_id": [6, 7]}', "utf-8")
    renderer = load_renderer(folder)
    ends = {
        renderer.tokenizer.control_ids[s] for s in ("<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>")
    }
    assert {5, 6, 7} | ends <= renderer.stop_ids


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("brackets", "<|endoftext|>")])
def test_stop_ids_of_a_jinja_model_hold_the_end_of_its_turns(name: str, end: str, tmp_path: Path) -> None:
    renderer = load_renderer(made.jinja_model(tmp_path, name))
    assert renderer.tokenizer.control_ids[end] in renderer.stop_ids


REFUSED = {
    "no assistant": made.chat(("user", "a")),
    "all weights 0": made.chat(("user", "a"), ("assistant", "b", 0)),
    "one token": PlainText(text="", source=SOURCE),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_without_a_trained_token_is_refused(case: str, phi3: Renderer) -> None:
    with pytest.raises(DataError, match="no token of this row is trained") as caught:
        phi3.example(REFUSED[case])
    assert caught.value.where == str(REFUSED[case].source)
    assert caught.value.do


def test_all_bad_rows_are_reported_at_once(phi3: Renderer) -> None:
    with pytest.raises(DataError, match="25 rows") as caught:
        phi3.examples([REFUSED["no assistant"]] * 25 + [CHAT])
    assert len(caught.value.findings) == 25
    assert "and 5 more" in str(caught.value)


def test_a_dropped_system_message_is_refused(tmp_path: Path) -> None:
    renderer = load_renderer(made.jinja_model(tmp_path, "no system"))
    with pytest.raises(DataError, match="leaves out the system message") as caught:
        renderer.example(CHAT)
    assert caught.value.where == "train.json:7"
    assert renderer.example(made.chat(("user", "a"), ("assistant", "b"))).num_trained


def test_a_template_that_never_ends_a_turn_is_refused(tmp_path: Path) -> None:
    renderer = load_renderer(made.jinja_model(tmp_path, "no end"))
    with pytest.raises(DataError, match="no token that ends an answer"):
        renderer.example(CHAT)


def test_the_date_of_a_template_stands_still(tmp_path: Path) -> None:
    renderer = load_renderer(made.jinja_model(tmp_path, "dated"))
    first = renderer.example(CHAT).ids.tolist()
    assert renderer.example(CHAT).ids.tolist() == first


def test_what_the_template_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    renderer = load_renderer(made.jinja_model(tmp_path, "brackets"))
    with pytest.raises(DataError) as caught:
        renderer.example(CHAT)
    assert caught.value.why == "no system role"


HOSTILE = {
    "reaches for Python": "{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}",
    "writes without end": "{% for i in range(9999) %}{% for j in range(9999) %}xxxx{% endfor %}{% endfor %}",
    "repeats without end": "{{ 'x' * 10000000000 }}",
    "powers": "{{ 9 ** 9 ** 9 }}",
    "changes its input": "{{ messages.append(1) }}",
    "divides by zero": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_is_stopped(case: str, tmp_path: Path) -> None:
    spec = made.byte_level([made.END_OF_TEXT])
    renderer = load_renderer(
        made.write_model(tmp_path, spec, template=HOSTILE[case], eos_token=made.END_OF_TEXT)
    )
    with pytest.raises(DataError):
        renderer.prompt([Message(role="user", content="a")])


def test_a_model_without_a_template_takes_text_only(tmp_path: Path) -> None:
    spec = made.byte_level([made.END_OF_TEXT])
    renderer = load_renderer(made.write_model(tmp_path, spec, template=None, config={"eos_token_id": 264}))
    assert renderer.template is None
    with pytest.raises(ModelError, match="no chat template") as caught:
        renderer.example(CHAT)
    assert "instruct model" in caught.value.do
    with pytest.raises(ModelError):
        renderer.prompt(CHAT.messages)
    rendered = renderer.example(PlainText(text="hello", source=SOURCE))
    assert rendered.ids[-1] == 264
    assert 264 in renderer.stop_ids


def test_control_tokens_alone_tell_the_phi_template(tmp_path: Path) -> None:
    for name in ("phi3", "phi4-mini"):
        folder = made.phi_model(tmp_path / name, name)
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        del config["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        template = load_renderer(folder).template
        assert template is not None
        assert template.name == name


def test_another_template_over_phi_tokens_is_not_taken_for_phi(tmp_path: Path) -> None:
    template = load_renderer(made.jinja_model(tmp_path, "no system")).template
    assert template is not None
    assert template.name == "jinja"


def test_a_truncating_tokenizer_file_cuts_nothing(tmp_path: Path) -> None:
    spec = made.byte_level([made.END_OF_TEXT])
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = None
    renderer = load_renderer(made.write_model(tmp_path, spec, template=None, eos_token=made.END_OF_TEXT))
    assert renderer.decode(renderer.example(PlainText(text="x" * 50, source=SOURCE)).ids.tolist()) == "x" * 50


BAD_FOLDERS = {
    "tokenizer.json": ("{", "cannot be read"),
    "tokenizer_config.json": ("[]", "no JSON object"),
    "config.json": ("{", "cannot be read"),
    "chat_template.jinja": ("{% for %}", "no Jinja"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_broken_model_file_is_named(name: str, tmp_path: Path) -> None:
    content, what = BAD_FOLDERS[name]
    folder = made.phi_model(tmp_path, "phi3")
    (folder / name).write_text(content, "utf-8")
    with pytest.raises(ModelError, match=what):
        load_renderer(folder)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_renderer(tmp_path)
    with pytest.raises(ModelError, match="no such model folder"):
        load_renderer(tmp_path / "none")


def test_a_tokenizer_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        load_renderer(tmp_path)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4))
def test_trained_tokens_spell_the_answers(answers: list[str]) -> None:
    renderer = demo()
    turns = [turn for answer in answers for turn in (("user", "q"), ("assistant", answer))]
    _, trained = spelt(renderer, renderer.example(made.chat(*turns)))  # type: ignore[arg-type]
    assert trained == "".join(answer.lstrip(WHITE_SPACE) + "<|end|>" for answer in answers)


@given(st.lists(st.sampled_from([CHAT, made.chat(("user", "a"), ("assistant", "b"))]), max_size=4))
def test_a_batch_is_the_same_as_one_by_one(examples: list[object]) -> None:
    renderer = demo()
    together = renderer.examples(examples)  # type: ignore[arg-type]
    for one, example in zip(together, examples, strict=True):
        alone = renderer.example(example)  # type: ignore[arg-type]
        assert one.ids.tolist() == alone.ids.tolist()
        assert one.trained.tolist() == alone.trained.tolist()


def demo() -> Renderer:
    if not DEMO:
        DEMO.append(load_renderer(demo_folder()))
    return DEMO[0]


DEMO: list[Renderer] = []


def test_the_demo_base_takes_the_phi3_template() -> None:
    renderer = demo()
    assert renderer.template is not None
    assert renderer.template.name == "phi3"
    assert renderer.example(CHAT).ids.tolist() == made.transformers_ids(demo_folder(), CHAT)
    assert renderer.stop_ids >= {
        renderer.tokenizer.control_ids[name] for name in ("<|end|>", "<|endoftext|>")
    }


def test_rendering_is_fast() -> None:
    renderer = demo()
    rows = [
        made.chat(
            ("user", f"how do I reset password number {i}?"),
            ("assistant", f"Go to page {i} and press reset."),
        )
        for i in range(2000)
    ]
    began = time.perf_counter()
    rendered = renderer.examples(rows)
    seconds = time.perf_counter() - began
    assert len(rendered) == 2000
    assert seconds < 2


def test_neither_data_nor_text_loads_torch_or_transformers() -> None:
    code = (
        "import sys, pathlib, phinetune.data.checking\n"
        "from phinetune.text.render import load_renderer\n"
        f"load_renderer(pathlib.Path({str(demo_folder())!r}))\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
