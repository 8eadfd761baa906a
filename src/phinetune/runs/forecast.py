"""Forecast a whole run before it begins: fit `auto` batch sizes into memory, refuse what cannot fit.

Knows nothing of run folders or terminals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from phinetune.base.errors import SpaceError
from phinetune.evaluation.cost import (
    answering_of,
    comparison_bytes,
    comparison_seconds,
    nothing_answered,
    planned_answers,
    step_seconds,
)
from phinetune.lora.attach import Adapter
from phinetune.models.catalog import num_weights
from phinetune.models.device import Compute
from phinetune.models.loading import Base
from phinetune.models.memory import Costs, available_bytes, release_unused
from phinetune.models.quantized import BITS, Quantization
from phinetune.runs.prepare import Prepared
from phinetune.text.row_files import num_tokens_of
from phinetune.training.distributed import ALONE, Ranks
from phinetune.training.forecast import (
    Forecast,
    Probe,
    probe,
    training_bytes,
    training_seconds,
)
from phinetune.training.packing import Rows, epoch_sequences, packed
from phinetune.training.plan import Plan, train_sampling
from phinetune.training.settings import TrainingSettings

NUM_CHANGES = 3
LARGEST_TEST_BATCH = 64


class Forecaster:
    """What was measured on a loaded base with its adapter; answers for any settings of batch and memory."""

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        prepared: Prepared,
        ranks: Ranks = ALONE,
        *,
        num_here: int = 1,
    ) -> None:
        """The `ranks` of a divided base must all measure; `num_here` processes share this machine."""
        self._prepared, self._base, self._num_ranks = prepared, base, ranks.size
        settings, plan = prepared.settings, prepared.plan
        self.sequences = epoch_sequences(plan.train_sequences, seed=settings.seed, epoch=0)
        self._probe = probe(base, adapter, settings, self.sequences, prepared.train.rendered, ranks)
        # All ranks must take the same decisions on what they measure next.
        test_s = self._probe.test_s
        if ranks.is_sharded:
            test_s = 1e-9 * ranks.highest(int(1e9 * test_s))
        examples, _ = prepared.used_test_examples()
        prompts, self._answering = planned_answers(
            base,
            prepared.renderer,
            examples,
            max_answered=0 if prepared.classes else settings.compare_nsamples,
            max_new_tokens=settings.compare_max_new_tokens,
            seed=settings.seed,
            system_prompt=settings.system_prompt,
        )
        self._steps = (
            step_seconds(base, adapter, prompts, test_s, ranks.agreed) if prompts else nothing_answered()
        )
        release_unused()
        self.costs = self._probe.costs
        self.available_bytes = _share(base.device, num_here)

    @property
    def probe(self) -> Probe:
        return self._probe

    @property
    def settings(self) -> TrainingSettings:
        return self._prepared.settings

    @property
    def plan(self) -> Plan:
        return self._prepared.plan

    def of(self, settings: TrainingSettings, costs: Costs | None = None) -> Forecast:
        """The forecast under settings that differ in batch sizes, checkpointing or costs."""
        prepared, probe = self._prepared, self._probe
        costs = costs or self.costs
        training = training_bytes(
            costs,
            settings,
            (self._sequences_of(settings), prepared.train.rendered),
            (prepared.plan.test_sequences, prepared.test.rendered),
        )
        tested = [piece for _, piece in prepared.used_test_examples()[1]]
        comparison = comparison_bytes(costs, self._answering, tested)
        # Training leaves holes between its tensors, and the comparison finds room in them.
        tensors, around = max(
            (training.most, costs.around(training.most)),
            (training.kept + comparison, costs.around(0)),
            key=sum,
        )
        return Forecast(
            seconds=training_seconds(probe, settings, prepared.plan, self._num_ranks),
            comparison_seconds=comparison_seconds(
                self._answering, prepared.plan.test.num_tokens, probe.test_s, self._steps
            ),
            tokens_per_second=self._num_ranks / probe.train_s,
            peak_memory_bytes=int(probe.held_bytes + tensors + around),
            available_bytes=self.available_bytes,
            memory={
                "held before": probe.held_bytes,
                "optimizer and best weights": int(training.kept),
                "a step": int(training.step),
                "an evaluation": int(training.evaluation),
                "the comparison": int(comparison),
                "process": int(around),
            },
        )

    def _sequences_of(self, settings: TrainingSettings) -> Sequence[Rows]:
        sampling = train_sampling(settings)
        if sampling == train_sampling(self.settings):
            return self.sequences
        rows, lengths = self.plan.train_sequences.rows, num_tokens_of(self._prepared.train.rendered)
        return epoch_sequences(packed(rows, lengths, sampling), seed=settings.seed, epoch=0)

    def fits(self, forecast: Forecast) -> bool:
        """Whether what is still to come is free now."""
        return forecast.peak_memory_bytes - self._probe.held_bytes <= self.available_bytes

    def resolved(self) -> dict[str, int]:
        """Numbers for the settings that say `auto`: the largest batches that fit, the update unchanged.

        Where nothing fits the smallest are returned; `refuse_too_large` then says so.
        """
        settings = self._prepared.settings
        found: dict[str, int] = {}
        if settings.finetune_test_batch_size == "auto":
            sizes = [1 << power for power in range(LARGEST_TEST_BATCH.bit_length() - 1, -1, -1)]
            choices = [{"finetune_test_batch_size": size} for size in sizes]
            found |= self._first_that_fits({"finetune_train_batch_size": 1}, choices)
        if settings.finetune_train_batch_size == "auto":
            whole = settings.effective_batch_size
            sizes = [size for size in range(whole, 0, -1) if whole % size == 0]
            found |= self._first_that_fits(
                found,
                [
                    {"finetune_train_batch_size": size, "gradient_accumulation_steps": whole // size}
                    for size in sizes
                ],
            )
        return found

    def _first_that_fits(self, others: dict[str, int], choices: list[dict[str, int]]) -> dict[str, int]:
        for choice in choices:
            if self.fits(self.of(self._prepared.settings.model_copy(update={**others, **choice}))):
                return choice
        return choices[-1]

    def refuse_too_large(self, settings: TrainingSettings) -> Forecast:
        """The forecast. Raises `SpaceError` with the cheapest changes that would fit when it cannot."""
        forecast = self.of(settings)
        if self.fits(forecast):
            return forecast
        needed = forecast.peak_memory_bytes - self._probe.held_bytes
        fitting = [
            f"{change} ({_size(changed.peak_memory_bytes)})"
            for change, changed in self.changes(settings)
            if self.fits(changed)
        ]
        raise SpaceError(
            "the run does not fit into memory",
            where=f"the whole run, at its peak {_size(forecast.peak_memory_bytes)}",
            why=f"{_size(needed)} more than is held now, and {_size(self.available_bytes)} are free",
            do=f"write {'; or '.join(fitting[:NUM_CHANGES])}"
            if fitting
            else "end other programs, or choose a smaller model: no single setting would make it fit",
        )

    def changes(self, settings: TrainingSettings) -> Iterator[tuple[str, Forecast]]:
        """Lines of lora.yaml that take less memory, cheapest first, each with its forecast."""
        for change in _same_result(settings):
            yield _lines(change), self.of(settings.model_copy(update=change))
        costs = self.costs
        rank = settings.lora_r
        if costs.item_bytes == 4:
            narrow = replace(costs, item_bytes=2, saved_per_token=0.6 * costs.saved_per_token)
            yield "dtype: bfloat16", self.of(settings, narrow)
        if settings.compare_nsamples > 8:
            yield "compare_nsamples: 8", self._with_fewer_answers(settings, 8)
        shorter = settings.finetune_train_seqlen // 2
        if max(num_tokens_of(self._prepared.train.rendered)) <= shorter:
            change = {"finetune_train_seqlen": shorter}
            yield _lines(change), self.of(settings.model_copy(update=change))
        if rank >= 8:
            fewer = replace(costs, num_adapter_parameters=costs.num_adapter_parameters // 2)
            yield f"lora_r: {rank // 2}", self.of(settings, fewer)

    def _with_fewer_answers(self, settings: TrainingSettings, num: int) -> Forecast:
        whole = self._answering
        lengths = list(zip(whole.prompt_lengths, whole.reference_lengths, strict=True))[:num]
        self._answering = answering_of(self._base, lengths, whole.max_new_tokens)
        try:
            return self.of(settings)
        finally:
            self._answering = whole


def _same_result(settings: TrainingSettings) -> Iterator[dict[str, Any]]:
    """Changes that leave every update as it is; those that cost no time first."""
    one = {"finetune_train_batch_size": 1, "gradient_accumulation_steps": settings.effective_batch_size}
    if settings.train_batch_size > 1:
        yield one
    if settings.test_batch_size > 1:
        yield {"finetune_test_batch_size": 1}
    if not settings.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
        if settings.train_batch_size > 1:
            yield {**one, "gradient_checkpointing": True}


def _lines(change: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}: {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in change.items()
    )


def _share(device: torch.device, num_here: int) -> int:
    """What is free for one of the processes on this machine; each has its own GPU, but they share memory."""
    return available_bytes(device) // (num_here if device.type == "cpu" else 1)


def refuse_base_too_large(
    folder: Path, compute: Compute, num_here: int = 1, *, quantize: Quantization = "none"
) -> None:
    """Raise `SpaceError` before a base is loaded whose weights alone do not fit, once for each process."""
    # Embeddings and head keep their type: of a quantised base this is the least it takes.
    each = compute.dtype.itemsize if quantize == "none" else BITS[quantize] / 8
    weights = num_weights(folder) * each
    free = _share(compute.device, num_here)
    if weights <= free:
        return
    half = quantize == "none" and compute.dtype.itemsize == 4 and weights / 2 <= free
    in_4_bits = quantize != "nf4" and num_weights(folder) * BITS["nf4"] / 8 <= free
    form = compute.dtype_name if quantize == "none" else quantize
    raise SpaceError(
        "the base model does not fit into memory",
        where=str(folder),
        why=f"its weights in {form} take {_size(weights)}, and {_size(free)} are free",
        do="write dtype: bfloat16, which takes half"
        if half
        else "write quantize: nf4, which keeps its linear layers in 4 bits"
        if in_4_bits
        else "end other programs, or choose a smaller model",
    )


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
