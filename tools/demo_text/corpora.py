"""Readers of the public corpora under `$PHINETUNE_DATA`, each giving documents. Knows no tokenizer.

Only sources under public-domain, CC BY, MIT, BSD, Apache and CDLA terms are read. `held_out=True` gives the
rows kept away from training; test splits that others measure on are never read.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from demo_text.document import Document, Turn, plain, task

Reader = Callable[[Path], Iterator[Document]]
QUOTES = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "—": " - ", "–": "-", "…": "...", "\u00a0": " "}
)


@dataclass(frozen=True, slots=True)
class Source:
    """A corpus: its share of the training rows, and one in how many documents is held out (0: none)."""

    name: str
    title: str
    licence: str
    weight: float
    read: Reader
    hold_out_every: int = 0

    def documents(self, root: Path, held_out: bool = False) -> Iterator[Document]:
        """Training documents, or the held-out ones."""
        for i, document in enumerate(self.read(root)):
            is_held_out = self.hold_out_every > 0 and i % self.hold_out_every == self.hold_out_every - 1
            if is_held_out == held_out:
                yield document


def _text(path: Path) -> str:
    return lzma.decompress(path.read_bytes()).decode("utf-8").translate(QUOTES)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _clean(text: str) -> str:
    return re.sub(r"[ \t]+", " ", text.translate(QUOTES)).strip()


def _sentence(text: str) -> str:
    text = _clean(text)
    return text[:1].upper() + text[1:] + ("" if text[-1:] in ".?!" else ".")


def _field(name: str, field: str = "text") -> Reader:
    def read(root: Path) -> Iterator[Document]:
        for row in _rows(root / name):
            yield plain(_clean(row[field]))

    return read


def _picture_books(root: Path) -> Iterator[Document]:
    for name in ("african-storybook", "pratham-books", "lida"):
        for row in _rows(root / f"simple-english/{name}.jsonl.xz"):
            yield plain(_clean(f"{row['title']}\n{row['text']}"))


def _children_books(root: Path) -> Iterator[Document]:
    """Pieces of about 1,800 characters that end with a paragraph; figures and odd markup left out."""
    for row in _rows(root / "simple-english/gutenberg-children.jsonl.xz"):
        piece: list[str] = []
        for paragraph in _clean(row["text"]).split("\n"):
            if any(mark in paragraph for mark in "|[]{}=_*"):
                continue
            piece.append(paragraph)
            if sum(map(len, piece)) > 1800:
                yield plain("\n".join(piece))
                piece = []


def _tatoeba(root: Path) -> Iterator[Document]:
    """Sentences in a fixed shuffled order, eight to a document."""
    lines = [line for line in _text(root / "simple-english/tatoeba-en.txt.xz").split("\n") if line]
    order = sorted(range(len(lines)), key=lambda i: (i * 7919) % 178697)
    for start in range(0, len(order), 8):
        yield plain("\n".join(lines[i] for i in order[start : start + 8]))


def _fairytale_questions(root: Path) -> Iterator[Document]:
    """A question after the part of the story that shares most words with it; test split left out."""
    stories = {
        row["id"]: _clean(row["text"]) for row in _rows(root / "simple-english/fairytaleqa-stories.jsonl.xz")
    }
    cut = {name: re.split(r"(?<=[.?!]) ", text) for name, text in stories.items()}
    for row in _rows(root / "simple-english/fairytaleqa-questions.jsonl.xz"):
        if row["split"] == "test" or (row["story"].lower() not in cut and row["story"] not in cut):
            continue
        sentences = cut.get(row["story"]) or cut[row["story"].lower()]
        question, answer = _clean(row["question"]), _sentence(row["answer"])
        wanted = set(re.findall(r"[a-z]{4,}", f"{question} {answer}".lower()))
        best = max(range(len(sentences)), key=lambda i: sum(w in sentences[i].lower() for w in wanted))
        passage = " ".join(sentences[max(0, best - 1) : best + 2])
        if len(passage) < 900:
            yield task(f"{passage}\n{question}", answer, learn_question=True)


def _fairytales(root: Path) -> Iterator[Document]:
    for row in _rows(root / "simple-english/fairytaleqa-stories.jsonl.xz"):
        if row["split"] != "test":
            yield plain(_clean(row["text"]))


def _persona(root: Path) -> Iterator[Document]:
    """Small talk in the friendly voice; every tenth scenario is left out."""
    for row in _rows(root / "persona-chat/persona-chat.en.jsonl.xz"):
        if row["scenario"] % 10 != 9:
            yield task(_clean(row["question"]), _clean(row["friendly"]), learn_question=True)


def _coffee(root: Path) -> Iterator[Document]:
    for row in _rows(root / "dialogues/taskmaster4.compact.jsonl.xz"):
        yield _alternate([(turn["s"], _clean(turn["t"])) for turn in row["turns"]])


def _alternate(said: list[tuple[str, str]]) -> Document:
    """Chat from turns; neighbours of one speaker are joined, and the first speaker is the user."""
    turns: list[Turn] = []
    for speaker, group in groupby(said, key=lambda pair: pair[0]):
        text = " ".join(text for _, text in group)
        role = speaker if speaker in ("user", "assistant") else ("user", "assistant")[len(turns) % 2]
        turns.append(Turn("user" if role == "user" else "assistant", text))
    return tuple(turns)


def _topical(root: Path) -> Iterator[Document]:
    """Open chat, in pieces of at most eight turns; the two `test` files are left out."""
    for name in ("valid_freq", "valid_rare"):
        for chat in json.loads(_text(root / f"dialogues/topical-chat.{name}.json.xz")).values():
            said = [(turn["agent"], _clean(turn["message"])) for turn in chat["content"]]
            for start in range(0, len(said) - 1, 8):
                yield _alternate(said[start : start + 8])


def _customers(root: Path) -> Iterator[Document]:
    """What customers write: MultiDoGO, BANKING77 and CLINC150 training rows, without any label."""
    rows = csv.DictReader(
        io.StringIO(_text(root / "intents/multidogo.turn_level.tsv.xz")),
        delimiter="\t",
        quoting=csv.QUOTE_NONE,
    )
    train = (row for row in rows if row["split"] == "train")
    for _, group in groupby(train, key=lambda row: row["conversationId"]):
        yield plain("\n".join(_clean(row["utterance"]) for row in group))
    banking = [
        _clean(row["text"])
        for row in csv.DictReader(io.StringIO(_text(root / "intents/banking77.train.csv.xz")))
    ]
    clinc = [
        _clean(text) for text, _ in json.loads(_text(root / "intents/clinc150.data_full.json.xz"))["train"]
    ]
    for lines in (banking, clinc):
        order = sorted(range(len(lines)), key=lambda i: (i * 7919) % 15013)
        for start in range(0, len(order), 6):
            yield plain("\n".join(lines[i] for i in order[start : start + 6]))


def _gsm8k(root: Path) -> Iterator[Document]:
    for row in _rows(root / "gsm8k/train.jsonl.xz"):
        answer = re.sub(r"<<[^>]*>>", "", row["answer"]).replace("#### ", "The answer is ")
        yield task(_clean(row["question"]), _clean(answer), learn_question=True)


def _instructions(root: Path) -> Iterator[Document]:
    for row in json.loads(_text(root / "instruct/llms-from-scratch.instruction-data.json.xz")):
        yield task(
            _clean(f"{row['instruction']}\n{row['input']}"), _clean(row["output"]), learn_question=True
        )


def _acts(root: Path) -> Iterator[Document]:
    """Dialogue act to sentence (RNNLG), training rows, both wordings."""
    for name in ("restaurant", "hotel", "laptop", "tv"):
        raw = _text(root / f"text2struct/rnnlg.{name}.train.json.xz")
        for act, *wordings in json.loads(raw[raw.index("[") :]):
            for text in dict.fromkeys(wordings):
                yield task(
                    _clean(act.replace("'", "").replace(";", "; ")),
                    _sentence(text.replace(" -s", "s").replace(" ,", ",")),
                )


def _babi(root: Path) -> Iterator[Document]:
    """Each question with the lines before it; the training file."""
    story: list[str] = []
    for line in _text(root / "text2struct/babi.all_shuffled_train.txt.xz").split("\n"):
        number, _, rest = line.partition(" ")
        if number == "1":
            story = []
        if "\t" not in rest:
            story.append(rest)
            continue
        question, answer, *_ = rest.split("\t")
        if len(story) <= 12:
            yield task(f"{' '.join(story)}\n{question.strip()}", answer.strip())


def _shell(root: Path) -> Iterator[Document]:
    for i, row in enumerate(_rows(root / "text2struct/nl2bash.jsonl.xz")):
        if i % 10 != 9 and len(row["nl"]) + len(row["cmd"]) < 400:
            yield task(_clean(row["nl"]), row["cmd"].strip(), learn_question=True)


SOURCES: tuple[Source, ...] = (
    Source(
        "tinystories",
        "TinyStories (part)",
        "CDLA-Sharing-1.0",
        16,
        _field("simple-english/tinystories.jsonl.xz"),
        40,
    ),
    Source("picture-books", "African Storybook, Pratham Books, LIDA", "CC-BY", 4, _picture_books),
    Source("tatoeba", "Tatoeba English sentences", "CC-BY-2.0", 6, _tatoeba, 100),
    Source("fairytales", "FairytaleQA stories", "Apache-2.0 / public domain", 4, _fairytales),
    Source("fairytale-questions", "FairytaleQA questions", "Apache-2.0", 4, _fairytale_questions),
    Source(
        "children-books", "Project Gutenberg children's books", "public domain (US)", 8, _children_books, 100
    ),
    Source("persona-chat", "Microsoft personality chat, friendly voice", "MIT", 3, _persona),
    Source("coffee", "Taskmaster-4", "CC-BY-4.0", 2, _coffee),
    Source("topical-chat", "Topical-Chat (validation files)", "CDLA-Sharing-1.0", 6, _topical, 50),
    Source(
        "customers",
        "MultiDoGO, BANKING77, CLINC150 (texts only)",
        "CDLA-Permissive-1.0, CC-BY-4.0, CC-BY-3.0",
        5,
        _customers,
    ),
    Source("gsm8k", "GSM8K training rows", "MIT", 1.5, _gsm8k),
    Source("instructions", "LLMs-from-scratch instruction rows", "Apache-2.0", 1, _instructions),
    Source("acts", "RNNLG training rows", "Apache-2.0", 3, _acts),
    Source("babi", "bAbI training questions", "CC-BY-3.0 / BSD", 2, _babi),
    Source("shell", "NL2Bash", "MIT", 1.5, _shell),
)


def common_words(root: Path, limit: int = 12000) -> tuple[str, ...]:
    """Lower-case words of the story books from the 300th to the `limit`-th commonest: real words to copy."""
    counts: dict[str, int] = {}
    for name in ("tinystories", "children-books", "picture-books"):
        source = next(source for source in SOURCES if source.name == name)
        for document in source.documents(root):
            for word in re.findall(r"\b[a-z]{3,12}\b", document[0].text):
                counts[word] = counts.get(word, 0) + 1
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return tuple(ranked[300:limit])
