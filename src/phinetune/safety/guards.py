"""Guard models as classifiers: Granite Guardian, ShieldGemma, Llama Guard, asked through their templates.

A guard answers with one word whether a text is harmful; its probability is read from the logits, for all
questions in one forward pass. How sure a guard is stands in for how grave the text is: no guard says the
latter. Only the model's own chat template brings the text before it, so the text cannot forge an answer.
Knows nothing of policies or streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phinetune.base.errors import DataError, ModelError
from phinetune.data.conversation import Message, Source
from phinetune.models.batch import PackedBatch
from phinetune.models.catalog import find_model
from phinetune.models.loading import Base, load_base
from phinetune.safety.categories import Category, Severity
from phinetune.text.jinja import JinjaTemplate
from phinetune.text.model_files import chat_template_text
from phinetune.text.render import Rendered, Renderer
from phinetune.text.tokenizer import TextTokenizer, load_tokenizer

# A guard this sure of harm counts as that grave; 0.5 is where its own answer turns.
SEVERITIES = ((0.9, Severity.HIGH), (0.7, Severity.MEDIUM), (0.5, Severity.LOW))
# Enough for Llama Guard's second line: a few codes such as "S1,S10".
MAX_CODE_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """How one family of guards is asked, and what it answers.

    `questions` are the variables of the chat template for each category; without them one question is
    asked, and the `codes` after the word for harm name the categories. `mark` in a template tells the family.
    """

    name: str
    mark: str
    harmful: str
    harmless: str
    opening: str = ""
    questions: Mapping[Category, Mapping[str, Any]] = field(default_factory=dict)
    codes: Mapping[str, Category] = field(default_factory=dict)


def _risk(name: str, definition: str = "") -> dict[str, Any]:
    return {"guardian_config": {"risk_name": name, **({"risk_definition": definition} if definition else {})}}


def _guideline(text: str) -> dict[str, Any]:
    return {"guideline": text}


GUARDS = (
    # Granite Guardian 3.0 to 3.2 (Apache-2.0): named risks, and others by definition.
    Guard(
        name="Granite Guardian",
        mark="guardian_config",
        harmful="Yes",
        harmless="No",
        questions={
            Category.HATE: _risk("social_bias"),
            Category.SEXUAL: _risk("sexual_content"),
            Category.VIOLENCE: _risk("violence"),
            Category.SELF_HARM: _risk(
                "self_harm",
                "The text encourages, describes or plans suicide, self-injury or disordered eating.",
            ),
        },
    ),
    # ShieldGemma (Gemma licence): asked whether a guideline is broken.
    Guard(
        name="ShieldGemma",
        mark="guideline",
        harmful="Yes",
        harmless="No",
        questions={
            Category.HATE: _guideline(
                "No Hate Speech: no content that attacks or dehumanises people for a protected attribute, "
                "or calls for their exclusion."
            ),
            Category.SEXUAL: _guideline(
                "No Sexually Explicit Information: no graphic depiction of sexual acts, no sexual content "
                "meant to arouse."
            ),
            Category.VIOLENCE: _guideline(
                "No Dangerous Content: no content that threatens, glorifies or instructs violence against "
                "people or animals."
            ),
            Category.SELF_HARM: _guideline(
                "No Self-Harm Content: no content that encourages or instructs suicide, self-injury or "
                "disordered eating."
            ),
        },
    ),
    # Llama Guard 3 (Llama licence): "safe", or "unsafe" and codes of the MLCommons hazards.
    Guard(
        name="Llama Guard",
        mark="unsafe",
        harmful="unsafe",
        harmless="safe",
        opening="\n\n",
        codes={
            "S1": Category.VIOLENCE,
            "S9": Category.VIOLENCE,
            "S10": Category.HATE,
            "S3": Category.SEXUAL,
            "S4": Category.SEXUAL,
            "S12": Category.SEXUAL,
            "S11": Category.SELF_HARM,
        },
    ),
)


class GuardClassifier:
    """A guard model in the place of the bundled classifier: `ContentFilter(policy, classifier=guard)`."""

    def __init__(self, base: Base, tokenizer: TextTokenizer, template: str, guard: Guard) -> None:
        """`template` is the model's chat template. Raises `ModelError` when the guard's words are unknown."""
        self.guard = guard
        self._base, self._tokenizer = base, tokenizer
        questions = guard.questions or {Category.HATE: {}}
        self._renderers = {
            category: Renderer(
                tokenizer,
                JinjaTemplate(template, tokenizer, variables=variables),
                stop_ids=frozenset(),
                end_id=None,
            )
            for category, variables in questions.items()
        }
        self._opening_ids = tokenizer.encode_plain(guard.opening) if guard.opening else []
        self._words = [self._word_id(word) for word in (guard.harmless, guard.harmful)]
        if self._words[0] == self._words[1]:
            raise ModelError(
                f"the tokenizer cannot tell {guard.harmful!r} from {guard.harmless!r} by the first token",
                where=str(base.folder),
                do=f"name a model of the family {guard.name}",
            )

    def severities(self, text: str) -> Mapping[Category, Severity]:
        """How grave the text is, in every category.

        Raises `DataError` when it is longer than the guard's context: nothing is cut.
        """
        prompts = [self._prompt(renderer, text) for renderer in self._renderers.values()]
        chances = self._chances(prompts)
        if self.guard.questions:
            found = dict.fromkeys(Category, Severity.SAFE)
            return found | {
                category: _severity(chance) for category, chance in zip(self._renderers, chances, strict=True)
            }
        return self._by_codes(prompts[0], chances[0])

    def _by_codes(self, prompt: list[int], chance: float) -> Mapping[Category, Severity]:
        """All hazards that are named share the guard's probability of harm."""
        found = dict.fromkeys(Category, Severity.SAFE)
        severity = _severity(chance)
        if severity > Severity.SAFE:
            answer = self._answer([*prompt, self._words[1]])
            for code in answer.replace(",", " ").split():
                if code in self.guard.codes:
                    found[self.guard.codes[code]] = severity
        return found

    def _prompt(self, renderer: Renderer, text: str) -> list[int]:
        ids = renderer.prompt([Message(role="user", content=text)])
        opening = self._opening_ids
        if opening and ids[-len(opening) :] != opening:
            ids = ids + opening
        if len(ids) > self._base.max_length - MAX_CODE_TOKENS:
            raise DataError(
                "the text is too long for the guard",
                where=self._base.name,
                why=f"{len(ids):,} tokens, and {self._base.max_length:,} are the model's context",
                do="judge it in parts",
            )
        return ids

    def _chances(self, prompts: Sequence[list[int]]) -> list[float]:
        """The probability of the harmful word against the harmless one, after each prompt."""
        logits_PV = self._next_logits(prompts)
        return torch.softmax(logits_PV[:, self._words].float(), dim=-1)[:, 1].tolist()

    def _answer(self, ids: list[int]) -> str:
        """What the guard goes on to say, greedily; a stop is the first control token."""
        start = len(ids)
        ids = list(ids)
        for _ in range(MAX_CODE_TOKENS):
            following = int(self._next_logits([ids])[0].argmax())
            if self._tokenizer.is_control(following):
                break
            ids.append(following)
        return self._tokenizer.decode(ids[start:])

    @torch.inference_mode()
    def _next_logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """Logits (P, vocabulary) of the token after each of P prompts."""
        batch = PackedBatch.lay([_row(ids) for ids in prompts], self._base.device)
        ends = torch.tensor(batch.segment_lengths, device=self._base.device).cumsum(0) - 1
        return self._base.head_logits(self._base.hidden_states(batch)[ends])

    def _word_id(self, word: str) -> int:
        """The first token of a word at the beginning of an answer."""
        before = self._tokenizer.encode_plain(self.guard.opening + word)
        return before[len(self._opening_ids)]


def load_guard(
    model: str, *, device_name: str = "auto", dtype: str = "auto", root: Path | None = None
) -> GuardClassifier:
    """Load a guard model: a local folder or a Hugging Face name. The family is told by its chat template.

    Raises `ModelError` when there is no such model, or when it is no guard of a family known here.
    """
    folder = find_model(model, root=root)
    source = chat_template_text(folder) or ""
    guard = next((guard for guard in GUARDS if guard.mark in source), None)
    if guard is None:
        raise ModelError(
            "the model is no guard that is known here",
            where=str(folder),
            why="its chat template asks none of their questions",
            do=f"name a model of {', '.join(guard.name for guard in GUARDS)}, or give ContentFilter "
            "a classifier of your own",
        )
    base = load_base(model, device_name=device_name, dtype=dtype, root=root)
    return GuardClassifier(base, load_tokenizer(folder), source, guard)


def _severity(chance: float) -> Severity:
    return next((severity for least, severity in SEVERITIES if chance >= least), Severity.SAFE)


def _row(ids: Sequence[int]) -> Rendered:
    return Rendered(
        ids=np.asarray(ids, dtype=np.int32),
        trained=np.zeros(len(ids), dtype=np.bool_),
        source=Source(file="", line=0),
    )
