"""The end of a run: base against adapter on the test set, and every file that tells of it.

Knows nothing of how the adapter was trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from phinetune.base.events import Compared, Event, Finished, Noted, Stage, Trained, Warned, read_events
from phinetune.evaluation.classify import compare_classes
from phinetune.evaluation.compare import Comparison, Progress, compare
from phinetune.lora.attach import Adapter
from phinetune.models.loading import Base
from phinetune.models.memory import peak_bytes, release_unused
from phinetune.reports.page import report_html
from phinetune.reports.plots import loss_plot
from phinetune.reports.trainer_state import trainer_state
from phinetune.runs.continuing import worse_than_it_began
from phinetune.runs.folder import RunFolder
from phinetune.runs.prepare import Prepared
from phinetune.runs.record import base_values, data_values
from phinetune.text.labelled import Labelled
from phinetune.training.forecast import Forecast


def prove(
    run: RunFolder,
    prepared: Prepared,
    base: Base,
    adapter: Adapter,
    trained: Trained,
    expected: Forecast,
    on_progress: Progress | None = None,
) -> Iterator[Event]:
    """Compare, then write summary.json, trainer_state.json, the plot and the report."""
    settings = prepared.settings
    examples, _ = prepared.used_test_examples()
    num_answered = len(examples) if prepared.classes else min(len(examples), settings.compare_nsamples)
    yield Stage(name="compare", detail=f"base and adapter answer {num_answered} test examples")
    began = time.perf_counter()
    comparison = compare_with_base(prepared, base, adapter, on_progress)
    compared = Compared(
        evaluation=comparison.evaluation(),
        answers=[asdict(answer) for answer in comparison.answers],
        seconds=time.perf_counter() - began,
    )
    yield compared
    for note in comparison.notes:
        yield Noted(what=note)
    verdicts = [*verdict_warnings(comparison), *worse_than_it_began(run)]
    for verdict in verdicts:
        yield Warned(what=verdict)
    warnings = [caution.what for caution in prepared.plan.warnings] + verdicts
    summary = _summary(run, prepared, base, adapter, trained, expected, compared, warnings)
    run.write_json(run.summary, summary)
    run.write_json(run.trainer_state, trainer_state(read_events(run.events)))
    loss_plot(run.events, run.loss_plot)
    report_html(run.path)
    yield Finished(summary=summary)


def compare_with_base(
    prepared: Prepared, base: Base, adapter: Adapter, on_progress: Progress | None = None
) -> Comparison:
    """Both sides on the test examples of the plan, as the settings say."""
    settings = prepared.settings
    examples, pieces = prepared.used_test_examples()
    if prepared.classes:
        rows = [row for _, row in pieces if isinstance(row, Labelled)]
        return compare_classes(
            base, prepared.classes.counts, examples, rows, seed=settings.seed, on_progress=on_progress
        )
    return compare(
        base,
        adapter,
        prepared.renderer,
        examples,
        pieces=pieces,
        max_answered=settings.compare_nsamples,
        max_new_tokens=settings.compare_max_new_tokens,
        seed=settings.seed,
        system_prompt=settings.system_prompt,
        loss_on=settings.loss_on,
        choices=prepared.choices,
        on_progress=_tidying(on_progress),
    )


def _tidying(on_progress: Progress | None) -> Progress:
    """Between two batches of a comparison freed memory goes back to the system."""

    def report(done: int, total: int) -> None:
        release_unused()
        if on_progress:
            on_progress(done, total)

    return report


def verdict_warnings(comparison: Comparison) -> Iterator[str]:
    """What a reader must not miss in a comparison."""
    loss = comparison.difference["loss"]
    if loss.low is not None and loss.low > 0:
        yield "the adapter is worse than its base on the test set: lower learning_rate, or train less"
    elif loss.high is not None and loss.high >= 0:
        yield "the test set shows no clear difference between adapter and base"


def _summary(
    run: RunFolder,
    prepared: Prepared,
    base: Base,
    adapter: Adapter,
    trained: Trained,
    expected: Forecast,
    compared: Compared,
    warnings: list[str],
) -> dict[str, Any]:
    plan = prepared.plan
    return {
        "run_id": run.run_id,
        "status": "succeeded",
        "stopped_because": trained.stopped_because,
        "base": base_values(base),
        "adapter": {
            "path": str(run.adapter),
            "parameters": adapter.num_parameters,
            "rank": adapter.settings.rank,
            "target_modules": list(adapter.target_modules),
            **({"classes": list(base.classifier.names)} if base.classifier else {}),
        },
        "data": data_values(prepared.files, (plan.train, plan.test)),
        "lineage": run.lineage(),
        "steps": trained.num_steps,
        "best_step": trained.best_step,
        "seconds": round(trained.seconds, 3),
        "tokens_per_second": round(trained.num_tokens / max(trained.seconds, 1e-9), 1),
        "comparison_seconds": round(compared.seconds, 3),
        "total_seconds": round(trained.seconds + compared.seconds, 3),
        "peak_memory_bytes": max(trained.peak_memory_bytes, peak_bytes(base.device)),
        "forecast": {
            "seconds": round(expected.seconds, 3),
            "comparison_seconds": round(expected.comparison_seconds, 3),
            "total_seconds": round(expected.total_seconds, 3),
            "peak_memory_bytes": expected.peak_memory_bytes,
        },
        "evaluation": compared.evaluation,
        "warnings": warnings,
    }
