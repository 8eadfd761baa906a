"""Put base and adapter side by side on the same examples: losses, answers, and how sure the difference is.

The base is the same model with its adapter switched off. Knows nothing of files or of how results are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from phinetune.base.errors import SettingsError
from phinetune.base.seeds import derive
from phinetune.data.conversation import Example, Source
from phinetune.evaluation.answers import Answered, answer_measures
from phinetune.evaluation.bootstrap import Difference, Floats, PairedMeasure, paired_bootstrap, totals
from phinetune.evaluation.macro_f1 import answered_macro_f1
from phinetune.evaluation.prompts import (
    Prompt,
    answer_prompts,
    default_max_new_tokens,
    fitting_pieces,
    longest_tokens,
    prompt_text,
)
from phinetune.evaluation.scores import ExampleScores, score_examples
from phinetune.generation.greedy import generate_batch
from phinetune.lora.attach import Adapter
from phinetune.models.loading import Base
from phinetune.text.render import Rendered, Renderer

if TYPE_CHECKING:
    from phinetune.generation.constraints import Grammar

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One prompt with the answer it should have and the two it got."""

    prompt: str
    reference: str
    base: str
    adapter: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The measures of one example; the names are those of `Comparison.base`, without perplexity."""

    source: Source
    num_trained_tokens: int
    base: Mapping[str, float]
    adapter: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The figures of both systems over the same examples.

    `difference` is adapter minus base. `notes` say in words what a reader must know: examples left out,
    answers stopped at `max_new_tokens`, how that number was chosen.
    """

    base: Mapping[str, float]
    adapter: Mapping[str, float]
    difference: Mapping[str, Difference]
    answers: tuple[Answer, ...]
    rows: tuple[Row, ...]
    num_scored: int
    num_answered: int
    max_new_tokens: int
    notes: tuple[str, ...]

    def evaluation(self) -> dict[str, Any]:
        """The part `evaluation` of summary.json; a figure that is not finite becomes null."""
        return {
            "base": {name: _finite(value) for name, value in self.base.items()},
            "adapter": {name: _finite(value) for name, value in self.adapter.items()},
            "difference": {
                name: {"value": _finite(entry.value), "low": entry.low, "high": entry.high}
                for name, entry in self.difference.items()
            },
        }


def compare(
    base: Base,
    adapter: Adapter,
    renderer: Renderer,
    examples: Sequence[Example],
    *,
    pieces: Sequence[tuple[int, Rendered]] | None = None,
    max_answered: int | None = None,
    max_new_tokens: int | None = None,
    num_answers_shown: int = 8,
    seed: int = 0,
    system_prompt: str | None = None,
    loss_on: Literal["assistant", "all"] = "assistant",
    choices: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> Comparison:
    """Measure base and adapter on `examples` and bootstrap the differences.

    Loss, perplexity and token accuracy come from every example that fits the model. Answers are generated for
    conversations: the turns before the last assistant turn are the prompt, that turn is the reference.
    `pieces` gives examples already rendered as (index of the example, piece); several pieces of a long text
    count as one example. At most `max_answered` examples, chosen by the seed, are answered.
    `max_new_tokens` defaults to a quarter more than the longest reference, plus 16. With `choices` both sides
    may only answer one of these texts, and macro-F1 over them is measured too.
    `on_progress(done, total)` counts examples scored and answered, for base and adapter each.

    Raises `DataError` when no example can be measured.
    """
    if pieces is None:
        rendered = renderer.examples(examples, system_prompt=system_prompt, loss_on=loss_on)
        pieces = list(enumerate(rendered))
    scored, notes = fitting_pieces(base, pieces, len(examples))
    prompts, prompt_notes = answer_prompts(
        base, renderer, examples, system_prompt=system_prompt, max_answered=max_answered, seed=seed
    )
    notes += prompt_notes
    if max_new_tokens is None and prompts:
        max_new_tokens = default_max_new_tokens(renderer, prompts, choices)
        notes.append(f"answers may have {max_new_tokens:,} new tokens, derived from the longest reference")
    grammar = None
    if choices and max_new_tokens is not None:
        grammar = _grammar(base, renderer, choices, max_new_tokens)
        notes.append(f"both sides had to answer one of {len(choices):,} texts")
    progress = _Counter(2 * (len(scored) + len(prompts)), on_progress)

    def measure() -> tuple[ExampleScores, list[list[int]]]:
        scores = score_examples(base, [entry for _, entry in scored], on_progress=progress.part(len(scored)))
        report = progress.part(len(prompts))
        answers = generate_batch(
            base,
            [prompt.ids for prompt in prompts],
            max_new_tokens=max_new_tokens or 0,
            stop_ids=renderer.stop_ids,
            grammar=grammar,
            on_progress=lambda done, _: report(done),
        )
        return scores, answers

    with adapter.disabled():
        base_scores, base_ids = measure()
    adapter_scores, adapter_ids = measure()
    notes += _stopped_notes(prompts, base_ids, adapter_ids, max_new_tokens or 0, base.max_length)

    answered = [
        Answered(
            index=prompt.index,
            reference=prompt.reference,
            base=renderer.decode(b),
            adapter=renderer.decode(a),
        )
        for prompt, b, a in zip(prompts, base_ids, adapter_ids, strict=True)
    ]
    measures = _loss_measures([index for index, _ in scored], base_scores, adapter_scores, len(examples))
    measures |= answer_measures(answered, len(examples))
    both = {name: totals(measure) for name, measure in measures.items()}
    difference = paired_bootstrap(measures, seed=derive(seed, "bootstrap"))
    if grammar and choices:
        both["macro_f1"], difference["macro_f1"] = answered_macro_f1(
            answered, choices, derive(seed, "bootstrap")
        )
    return Comparison(
        base={name: values[0] for name, values in both.items()},
        adapter={name: values[1] for name, values in both.items()},
        difference=difference,
        answers=_shown(prompts, answered, num_answers_shown, seed),
        rows=_rows(examples, measures),
        num_scored=len(scored),
        num_answered=len(answered),
        max_new_tokens=max_new_tokens or 0,
        notes=tuple(notes),
    )


def _grammar(base: Base, renderer: Renderer, choices: Sequence[str], max_new_tokens: int) -> Grammar:
    """The form of answers that may only be one of the choices."""
    from phinetune.generation.constraints import Grammars

    longest = longest_tokens(renderer, choices)
    if max_new_tokens <= longest:
        raise SettingsError(
            "the longest answer does not fit compare_max_new_tokens",
            where="compare_max_new_tokens",
            why=f"it has {longest} tokens and needs one more to end",
            do=f"write compare_max_new_tokens: {longest + 1}, or null",
        )
    grammars = Grammars(renderer.tokenizer, vocab_size=base.vocab_size, stop_ids=renderer.stop_ids)
    return grammars.choice(choices)


def _stopped_notes(
    prompts: Sequence[Prompt],
    base_ids: Sequence[Sequence[int]],
    adapter_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_length: int,
) -> list[str]:
    """How many answers met a limit instead of ending by themselves."""
    limits = [min(max_new_tokens, max_length - len(prompt.ids)) for prompt in prompts]
    notes = []
    for name, answers in (("base", base_ids), ("adapter", adapter_ids)):
        num = sum(len(answer) >= limit for answer, limit in zip(answers, limits, strict=True))
        if num:
            notes.append(f"{num:,} of {len(prompts):,} answers of the {name} were stopped at the token limit")
    return notes


def _loss_measures(
    places: list[int], base: ExampleScores, adapter: ExampleScores, num_examples: int
) -> dict[str, PairedMeasure]:
    def spread(values: Floats) -> Floats:
        full = np.zeros(num_examples)
        np.add.at(full, places, values)  # pieces of one text add up
        return full

    weight_N = spread(base.num_trained_N)
    loss = PairedMeasure(base_N=spread(base.nll_N), adapter_N=spread(adapter.nll_N), weight_N=weight_N)
    return {
        "loss": loss,
        "perplexity": replace(loss, is_exponential=True),
        "token_accuracy": PairedMeasure(
            base_N=spread(base.num_correct_N), adapter_N=spread(adapter.num_correct_N), weight_N=weight_N
        ),
    }


def _rows(examples: Sequence[Example], measures: Mapping[str, PairedMeasure]) -> tuple[Row, ...]:
    rows = []
    for index, example in enumerate(examples):
        concerned = {
            name: measure
            for name, measure in measures.items()
            if measure.weight_N[index] > 0 and not measure.is_exponential
        }
        rows.append(
            Row(
                source=example.source,
                num_trained_tokens=int(measures["loss"].weight_N[index]),
                base={name: float(m.base_N[index] / m.weight_N[index]) for name, m in concerned.items()},
                adapter={
                    name: float(m.adapter_N[index] / m.weight_N[index]) for name, m in concerned.items()
                },
            )
        )
    return tuple(rows)


def _shown(
    prompts: Sequence[Prompt], answered: Sequence[Answered], num: int, seed: int
) -> tuple[Answer, ...]:
    """A seeded sample of the answers, in the order of the examples: nobody picked the pretty ones."""
    random = np.random.default_rng(derive(seed, "answers shown"))
    chosen = sorted(random.permutation(len(answered))[: max(0, num)].tolist())
    return tuple(
        Answer(
            prompt=prompt_text(prompts[place].messages),
            reference=answered[place].reference,
            base=answered[place].base,
            adapter=answered[place].adapter,
        )
        for place in chosen
    )


class _Counter:
    """Adds up the progress of several parts."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self._total, self._on_progress, self._finished = total, on_progress, 0

    def part(self, size: int) -> Callable[[int], None]:
        """A callback for the next part of `size` examples, which counts from 0 again."""
        start = self._finished
        self._finished += size

        def report(done: int) -> None:
            if self._on_progress:
                self._on_progress(start + done, self._total)

        return report


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
