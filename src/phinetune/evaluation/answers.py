"""Measures of generated answers against their references, ready for the bootstrap.

Knows nothing of models or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from phinetune.evaluation.bootstrap import PairedMeasure
from phinetune.evaluation.metrics import exact_match, json_fields, json_object, json_valid, token_f1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The reference of the example at `index`, and what base and adapter answered."""

    index: int
    reference: str
    base: str
    adapter: str


def answer_measures(answered: Sequence[Answered], num_examples: int) -> dict[str, PairedMeasure]:
    """Exact match and token F1; JSON validity and fields too when every reference is a JSON object.

    An example without an answer has weight 0; a field counts only where the reference has it.
    """
    if not answered:
        return {}
    measures = {
        "exact_match": _measure(answered, num_examples, exact_match),
        "token_f1": _measure(answered, num_examples, token_f1),
    }
    references = [json_object(entry.reference) for entry in answered]
    if any(reference is None for reference in references):
        return measures
    measures["json_valid"] = _measure(answered, num_examples, lambda _, answer: json_valid(answer))
    names = dict.fromkeys(name for reference in references if reference is not None for name in reference)
    return measures | _field_measures(answered, num_examples, list(names))


def _measure(
    answered: Sequence[Answered], num_examples: int, score: Callable[[str, str], float]
) -> PairedMeasure:
    columns = np.zeros((3, num_examples))
    for entry in answered:
        columns[:, entry.index] = (
            score(entry.reference, entry.base),
            score(entry.reference, entry.adapter),
            1.0,
        )
    return PairedMeasure(base_N=columns[0], adapter_N=columns[1], weight_N=columns[2])


def _field_measures(
    answered: Sequence[Answered], num_examples: int, names: list[str]
) -> dict[str, PairedMeasure]:
    columns = {name: np.zeros((3, num_examples)) for name in names}
    for entry in answered:
        reference = json_object(entry.reference) or {}
        by_base, by_adapter = json_fields(reference, entry.base), json_fields(reference, entry.adapter)
        for name in reference:
            columns[name][:, entry.index] = by_base[name], by_adapter[name], 1.0
    return {
        f"field:{name}": PairedMeasure(base_N=column[0], adapter_N=column[1], weight_N=column[2])
        for name, column in columns.items()
    }
