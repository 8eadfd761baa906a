"""What is counted is what autograd and the allocator really hold, and it grows with the work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest
import torch
from tiny_models import ARCHITECTURES, random_rows, tiny_base
from torch.profiler import ProfilerActivity, profile

from phinetune.lora.attach import LoraSettings, attach
from phinetune.models import memory
from phinetune.models.batch import PackedBatch
from phinetune.models.loading import Base
from phinetune.models.loss import trained_token_loss
from phinetune.models.memory import Costs, StepShape, available_bytes, peak_bytes, saved_bytes

LENGTHS = [64] * 4  # 256 tokens: nothing has to be filled
LORA = LoraSettings(rank=4, alpha=8.0, dropout=0.1, target_modules=None)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked to keep memory")
def test_memory_that_was_freed_is_kept_until_it_is_given_back():
    code = """
import resource, torch
from phinetune.models.memory import keep_freed, release_unused, resident_bytes
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
keep_freed()
def work(): [torch.ones(5_000_000) for _ in range(3)]
work()
before = faults()
work()
again, held = faults() - before, resident_bytes()
release_unused()
print(again, held - resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    num_faults, num_given_back = map(int, done.stdout.split())
    # 60 MB are 14,648 pages; where tensors are aligned, one of the three may not fit into what is free.
    assert num_faults < 5_500
    assert num_given_back > 15e6


def costs_of(base: Base, lengths: list[int] = LENGTHS) -> tuple[Costs, PackedBatch]:
    adapter = attach(base.model, LORA, seed=0)
    base.model.train()
    batch = PackedBatch.lay(random_rows(lengths))
    saved = saved_bytes(base, lambda: trained_token_loss(base, batch))
    weights = {"num_adapter_parameters": adapter.num_parameters, "num_moments": 2}
    return Costs.of(base, saved / batch.num_tokens, **weights), batch


def peak_of(work: Callable[[], object]) -> int:
    """The most that tensors held at once, by the profiler's record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_is_counted_as_large_as_it_is(name):
    base = tiny_base(name)
    costs, batch = costs_of(base)

    def step() -> None:
        loss, _ = trained_token_loss(base, batch)
        loss.backward()

    step()  # gradients exist from here on
    counted = costs.step(shape_of(batch), is_checkpointed=False)
    assert counted == pytest.approx(peak_of(step), rel=0.15)


def shape_of(batch: PackedBatch) -> StepShape:
    return StepShape(
        num_tokens=batch.num_tokens,
        num_trained_tokens=int((batch.targets_T >= 0).sum()),
        longest_segment=max(batch.segment_lengths),
    )


def test_what_autograd_keeps_grows_with_the_tokens():
    base = tiny_base()
    costs, _ = costs_of(base)
    few = replace(costs, saved_per_token=0.0)
    larger = StepShape(num_tokens=1024, num_trained_tokens=100, longest_segment=64)
    smaller = replace(larger, num_tokens=512)
    assert costs.step(larger, is_checkpointed=False) > 1.9 * costs.step(smaller, is_checkpointed=False)
    assert few.step(larger, is_checkpointed=False) < costs.step(larger, is_checkpointed=False)


def test_checkpointing_takes_less_memory():
    costs, batch = costs_of(tiny_base(num_hidden_layers=6))
    shape = shape_of(batch)
    assert costs.step(shape, is_checkpointed=True) < costs.step(shape, is_checkpointed=False) / 2


def test_more_trained_tokens_take_more_memory_up_to_a_chunk_of_logits():
    costs = replace(costs_of(tiny_base())[0], vocab_size=1 << 20, hidden_size=1, inner_size=1)
    bytes_of = [
        costs.evaluation(StepShape(num_tokens=128, num_trained_tokens=number, longest_segment=64))
        for number in (30, 60, 128, 1000)
    ]
    assert bytes_of[0] < bytes_of[1] < bytes_of[2]
    assert bytes_of[3] < 1.001 * bytes_of[2]


def test_a_larger_adapter_takes_more_memory():
    costs, _ = costs_of(tiny_base())
    larger = replace(costs, num_adapter_parameters=costs.num_adapter_parameters + 1000)
    assert larger.kept() == costs.kept() + 16_000
    assert larger.saving() > costs.saving()
    assert replace(larger, num_moments=0).kept() == larger.kept() / 2


def test_a_gpu_has_no_process_around_its_tensors():
    costs, _ = costs_of(tiny_base())
    on_gpu = replace(costs, is_cpu=False, has_prepared_shapes=False, tokens_multiple=1)
    assert costs.around(1e6) > 0
    assert on_gpu.around(1e6) == 0
    assert on_gpu.kept() < costs.kept()  # the best weights wait on the CPU


def test_available_memory_is_within_the_limit_of_the_container(monkeypatch):
    cpu = torch.device("cpu")
    assert 0 < available_bytes(cpu) < psutil.virtual_memory().total
    monkeypatch.setattr(memory, "_cgroup_bytes", {"memory.max": 5000, "memory.current": 2000}.get)
    assert available_bytes(cpu) == 3000


def test_the_peak_is_at_least_what_is_held_now():
    held = psutil.Process().memory_info().rss
    assert 0.9 * held <= memory.peak_resident_bytes() < psutil.virtual_memory().total
    assert peak_bytes(torch.device("cpu")) >= memory.peak_resident_bytes() * 0.9


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked to keep memory")
def test_memory_that_was_freed_goes_back(monkeypatch):
    memory.release_unused()
    held = memory.resident_bytes()
    kept = [torch.ones(50_000) for _ in range(500)]
    assert memory.resident_bytes() > held + 80e6
    del kept
    memory.release_unused()
    assert memory.resident_bytes() < held + 40e6
