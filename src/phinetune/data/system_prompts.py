"""Advice on system prompts: one or two plain sentences to train with, more of the format at inference.

Templates for common tasks, and a linter for a pair of prompts. Knows nothing of models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from phinetune.data.private.finding import private_spans

MAX_TRAINING_SENTENCES = 2
MAX_TRAINING_WORDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """What to train with, what to ask with, and when."""

    task: str
    when: str
    training: str
    inference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One thing to change in a prompt."""

    rule: str
    message: str
    fix: str


TEMPLATES: tuple[PromptTemplate, ...] = (
    PromptTemplate(
        task="style",
        when="the answers differ from the base's only in tone or wording: often no system prompt is needed",
        training="Answer in plain words that a ten-year-old understands.",
        inference="Answer in plain words that a ten-year-old understands. Use short sentences and no jargon.",
    ),
    PromptTemplate(
        task="json",
        when="the answers have a structure: train with what they say, ask with how they look",
        training="Say which product, order and problem the customer writes about.",
        inference="Say which product, order and problem the customer writes about. "
        'Answer with one JSON object with the keys "product", "order" and "problem" and nothing else.',
    ),
    PromptTemplate(
        task="classify",
        when="the answer is one of a few labels",
        training="Say which feeling the text shows.",
        inference="Say which feeling the text shows. Answer with one word: joy, anger, fear or sadness.",
    ),
    PromptTemplate(
        task="extract",
        when="the answer stands in the text that is given",
        training="Answer from the text that is given.",
        inference="Answer from the text that is given, in its own words. "
        "If it does not say, answer: not stated.",
    ),
    PromptTemplate(
        task="persona",
        when="the answers speak as somebody",
        training="You are a friendly guide in a museum of the sea.",
        inference="You are a friendly guide in a museum of the sea. Answer in two or three sentences, and "
        "invite the visitor to the next room.",
    ),
)

_SENTENCE_END = re.compile(r"[.!?…。](?:\s|$)|\n+")
_BLANK = re.compile(
    r"\{\{?\s*\w+\s*\}?\}|<[a-z_ ]{2,30}>|\[(?:your|insert)[^\]]*\]|\bTODO\b|\bXXX\b", re.IGNORECASE
)
_CONTROL = re.compile(r"<\|[\w/]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")
_OTHERS = re.compile(r"\byou are (?:chatgpt|claude|gemini|copilot|gpt-?\d)", re.IGNORECASE)


def template(task: str) -> PromptTemplate | None:
    """The template of a task.

    >>> template("json").training
    'Say which product, order and problem the customer writes about.'
    """
    return next((entry for entry in TEMPLATES if entry.task == task), None)


def num_sentences(text: str) -> int:
    """How many sentences a prompt has.

    >>> num_sentences("Be short. Be kind")
    2
    """
    return sum(bool(part.strip()) for part in _SENTENCE_END.split(text))


def lint_prompts(training: str, inference: str = "") -> list[Advice]:
    """What to change in a training prompt and in the one for inference; nothing for an empty one."""
    found = [*_length(training), *_each("training", training), *_each("inference", inference)]
    if training.strip() and inference.strip():
        found += _pair(training, inference)
    return found


def _length(training: str) -> list[Advice]:
    count, num_words = num_sentences(training), len(training.split())
    if count <= MAX_TRAINING_SENTENCES and num_words <= MAX_TRAINING_WORDS:
        return []
    fix = "keep one or two plain sentences to train with; move the rest to the prompt for inference"
    return [Advice(rule="long_training_prompt", message=f"{count} sentences, {num_words} words", fix=fix)]


def _each(name: str, text: str) -> list[Advice]:
    found = []
    for rule, pattern, fix in (
        ("blank_left", _BLANK, "fill it in, or take it out"),
        ("control_text", _CONTROL, "take it out: in text it is letters, never a control token"),
        ("other_program", _OTHERS, "say what the answers are to be like, not whom they are from"),
    ):
        if match := pattern.search(text):
            found.append(Advice(rule=rule, message=f"the {name} prompt holds {match.group()!r}", fix=fix))
    if private_spans(text):
        fix = "take it out: a system prompt is trained with every row"
        found.append(Advice(rule="private_data", message=f"the {name} prompt holds private data", fix=fix))
    return found


def _pair(training: str, inference: str) -> list[Advice]:
    if len(inference.split()) < len(training.split()):
        fix = "train with the short one; ask with the one that says more of the format"
        return [
            Advice(rule="shorter_inference", message="the prompt for inference is the shorter one", fix=fix)
        ]
    shared = set(training.casefold().split()) & set(inference.casefold().split())
    if len(shared) * 2 < len(set(training.casefold().split())):
        fix = "begin it with the training prompt, then add the format"
        return [Advice(rule="unrelated_inference", message="the two prompts share few words", fix=fix)]
    return []
