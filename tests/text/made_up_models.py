"""Small made-up model folders: the control tokens and templates of real families over tiny vocabularies."""

# ruff: noqa: E501 (templates and vocabularies read best unbroken)
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phinetune.data.conversation import Conversation, Message, Role, Source

PHI_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
IM_TOKENS = ("<|im_start|>", "<|im_sep|>", "<|im_end|>")
END_OF_TEXT = "<|endoftext|>"

_LOOP = "{% for m in messages %}"
_PHI3_TURN = "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}"
_PHI3_END = "{% endfor %}{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
_IM_TURN = "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}"
_IM_END = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"

# The Jinja of each family, written anew: what transformers renders in the comparisons.
PHI_JINJA = {
    "phi3": _LOOP + _PHI3_TURN + _PHI3_END,
    "phi3.5": _LOOP
    + "{% if m['role'] != 'system' or m['content'] %}"
    + _PHI3_TURN
    + "{% endif %}"
    + _PHI3_END,
    "phi4-mini": (_LOOP + _PHI3_TURN + _PHI3_END).replace("\\n", ""),
    "phi4": _LOOP + _IM_TURN + _IM_END,
}
OTHER_JINJA = {
    # tokens and line breaks
    "chatml": _LOOP
    + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    # brackets are plain text, contents are trimmed, the answer ends with end of text
    "brackets": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    + "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    + "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}",
    # the dropped-system template of an older Phi-3
    "no system": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    + "{{ '<|user|>\\n' + m['content'] + '<|end|>\\n<|assistant|>\\n' }}"
    + "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}",
    # rewrites what an assistant says, in every turn
    "rewriting": _LOOP
    + "<|im_start|>{{ m.role }}\n{{ m.content | replace('&', 'and') }}<|im_end|>\n{% endfor %}"
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # an added text before the answer, which generation has to write too
    "thinking": _LOOP
    + "{{ '<|im_start|>' + m.role + '\\n' + ('<think></think>' if m.role == 'assistant' else '') + m.content }}"
    + "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    # ends a turn with plain text: a model trained so would never stop
    "no end": _LOOP
    + "{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    # puts the day into the header
    "dated": "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}"
    + _LOOP
    + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}{% endfor %}",
    # marks the assistant's text the way training templates do
    "generation tag": _LOOP
    + "{{ '<|im_start|>' + m.role + '\\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}


def token(index: int, surface: str, **flags: bool) -> dict[str, Any]:
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": surface, **defaults, **flags}


def byte_level(controls: list[str], *, stripping: tuple[str, ...] = ()) -> dict[str, Any]:
    """Byte-level BPE: 256 bytes, a few merges, and control tokens after them."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = [*sorted(ByteLevel.alphabet()), "Ġa", "he", "ll", "ĊĊ", "<|", "|>", "en", "<|en"]
    merges = [
        ["Ġ", "a"],
        ["h", "e"],
        ["l", "l"],
        ["Ċ", "Ċ"],
        ["<", "|"],
        ["|", ">"],
        ["e", "n"],
        ["<|", "en"],
    ]
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}
    added = [token(len(pieces) + i, name, rstrip=name in stripping) for i, name in enumerate(controls)]
    steps = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": steps,
            "post_processor": None, "decoder": steps, "model": model}  # fmt: skip


def sentencepiece(controls: list[str], *, stripping: tuple[str, ...] = ()) -> dict[str, Any]:
    """BPE as Phi-3 has it: "▁" for a space and before each text, bytes for unknown characters."""
    letters = "▁abcdefghijklmnopqrstuvwxyz<|>/!."
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁a", "he", "<|"]
    merges = [["▁", "a"], ["h", "e"], ["<", "|"]]
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges,
             "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}  # fmt: skip
    first = [token(i, name) for i, name in enumerate(pieces[:3])]
    rest = [token(len(pieces) + i, name, rstrip=name in stripping) for i, name in enumerate(controls)]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
    return {"version": "1.0", "added_tokens": first + rest, "normalizer": normalizer, "pre_tokenizer": None,
            "post_processor": None, "decoder": {"type": "Sequence", "decoders": decoders}, "model": model}  # fmt: skip


def metaspace_first(controls: list[str], *, stripping: tuple[str, ...] = ()) -> dict[str, Any]:
    """The same pieces, but only the first word of a whole text gets its "▁"."""
    spec = sentencepiece(controls, stripping=stripping)
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return {**spec, "normalizer": None, "pre_tokenizer": metaspace}


def unigram(controls: list[str], *, stripping: tuple[str, ...] = ()) -> dict[str, Any]:
    """Unigram whose ordinary vocabulary holds the control surfaces as likely pieces."""
    pieces = [["<unk>", 0.0], *([name, -0.1] for name in controls)]
    pieces += [[char, -5.0] for char in "▁abcdefghijklmnopqrstuvwxyz<|>/_! \n"]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    added = [token(1 + i, name, rstrip=name in stripping) for i, name in enumerate(controls)]
    return {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": metaspace,
            "post_processor": None, "decoder": metaspace, "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}}  # fmt: skip


def word_lookup(controls: list[str], *, stripping: tuple[str, ...] = ()) -> dict[str, Any]:
    """BPE that looks whole words up before merging, with the control surfaces among its words."""
    spec = byte_level(controls, stripping=stripping)
    spec["model"]["ignore_merges"] = True
    for entry in spec["added_tokens"]:
        spec["model"]["vocab"][entry["content"]] = entry["id"]
    spec["pre_tokenizer"] = {**spec["pre_tokenizer"], "use_regex": False}
    return spec


def write_model(
    folder: Path,
    spec: dict[str, Any],
    *,
    template: str | None,
    config: dict[str, Any] | None = None,
    **special: str,
) -> Path:
    """A model folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    if template is not None:
        tokenizer_config["chat_template"] = template
    contents = {
        "tokenizer.json": spec,
        "tokenizer_config.json": tokenizer_config,
        "config.json": config or {},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    return folder


def phi_model(
    folder: Path, name: str, *, strips: bool = True, strips_left: bool = False, spec: Any = byte_level
) -> Path:
    """A model folder with the control tokens and the template of one Phi family."""
    controls = [END_OF_TEXT, *PHI_ROLES, *IM_TOKENS] + (["<|tool|>"] if name == "phi4-mini" else [])
    made = spec(controls, stripping=PHI_ROLES if strips else ())
    for entry in made["added_tokens"]:
        entry["lstrip"] = strips_left
    eos = "<|im_end|>" if name == "phi4" else END_OF_TEXT
    return write_model(folder, made, template=PHI_JINJA[name], eos_token=eos, bos_token=END_OF_TEXT)


def jinja_model(folder: Path, name: str, *, spec: Any = byte_level) -> Path:
    """A model folder whose template only Jinja can write."""
    controls = [END_OF_TEXT, "<|bos|>", *PHI_ROLES, *IM_TOKENS]
    template = OTHER_JINJA[name]
    return write_model(folder, spec(controls), template=template, eos_token=END_OF_TEXT, bos_token="<|bos|>")


def chat(*turns: tuple[Role, str] | tuple[Role, str, int]) -> Conversation:
    messages = tuple(
        Message(role=turn[0], content=turn[1], weight=turn[2] if len(turn) == 3 else 1) for turn in turns
    )
    return Conversation(messages=messages, source=Source(file="train.json", line=7))


def transformers_ids(
    folder: Path, conversation: Conversation, *, generation_prompt: bool = False
) -> list[int]:
    """What transformers makes of the same chat."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    special = {key: config[key] for key in ("eos_token", "bos_token") if key in config}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    ids = tokenizer.apply_chat_template(
        messages,
        chat_template=config["chat_template"],
        add_generation_prompt=generation_prompt,
        return_dict=False,
    )
    return list(ids)
