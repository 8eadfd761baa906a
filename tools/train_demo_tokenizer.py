"""Train the demo base's tokenizer: byte-level BPE of 4,096 ids with Phi-3's chat tokens.

Usage: PHINETUNE_DATA=... python tools/train_demo_tokenizer.py --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from demo_text import skills
from demo_text.corpora import SOURCES, common_words
from demo_text.rendering import ASSISTANT, CONTROL_TOKENS, END, END_OF_TEXT, PAD, SYSTEM, USER
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
NUM_PIECES = 2400  # the other ids are pieces with a space before them
SPACE = "Ġ"
STRIPPING = (SYSTEM, USER, ASSISTANT, END)  # white space after these is not part of the content
# letters with one leading space; single digits; runs of punctuation; white space
PIECES = r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PIECES_WITHOUT_SPACE = r"'(?:s|t|re|ve|m|ll|d)\b|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+| |\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def sample_texts(root: Path, per_weight: int = 220_000, skill_documents: int = 14_000) -> Iterator[str]:
    """Characters of each source in proportion to its weight, and generated tasks."""
    for source in SOURCES:
        left = int(source.weight * per_weight)
        for document in source.documents(root):
            for turn in document:
                yield turn.text
                left -= len(turn.text)
            if left <= 0:
                break
    for document in islice(
        skills.documents(skills.SKILLS, seed=11, real=common_words(root)), skill_documents
    ):
        for turn in document:
            yield turn.text


def train(texts: Iterator[str], num_pieces: int = NUM_PIECES) -> Tokenizer:
    """The tokenizer with its added tokens; ids 0 to 5 are control tokens.

    Word pieces are learnt without the space before a word. Then the commonest first pieces get a form with
    the space, merged last. So a word is cut in the same places after a space, a quote or a line break, and
    copying it from a sentence into JSON is a copy piece by piece.
    """
    sample = list(texts)
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = _pre_tokenizer(PIECES_WITHOUT_SPACE)
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    pieces.train_from_iterator(iter(sample), trainer=trainer)
    learnt = json.loads(pieces.to_str())["model"]
    vocab: dict[str, int] = learnt["vocab"]
    merges = [(left, right) for left, right in learnt["merges"]]

    after_space = Counter(m for text in sample for m in re.findall(r"(?<= )[^\s\d]+", text))
    first: Counter[str] = Counter()
    for word, count in after_space.items():
        first[pieces.encode(word, add_special_tokens=False).tokens[0]] += count
    for piece, _ in sorted(first.items(), key=lambda item: (-item[1], item[0])):
        if len(vocab) == VOCAB_SIZE:
            break
        if SPACE + piece not in vocab:
            vocab[SPACE + piece] = len(vocab)
            merges.append((SPACE, piece))

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(PIECES)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=t in STRIPPING) for t in CONTROL_TOKENS]
    )
    return tokenizer


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def write(tokenizer: Tokenizer, out: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json` as transformers reads them."""
    out.mkdir(parents=True, exist_ok=True)
    spec = json.loads(tokenizer.to_str())
    (out / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1) + "\n", "utf-8")
    decoder = {
        str(token["id"]): {
            k: token[k] for k in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        }
        for token in spec["added_tokens"]
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": decoder,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("PHINETUNE_DATA"),
        required="PHINETUNE_DATA" not in os.environ,
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write(train(sample_texts(Path(args.data))), args.out)
    print(f"wrote {args.out / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
