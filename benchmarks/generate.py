"""Many adapters in one batch against the base alone, one after another, and PEFT's mixed batches.

    pip install -e .[bench]
    python benchmarks/generate.py             a table
    python benchmarks/generate.py --json      one JSON object
    python benchmarks/generate.py --quick     fewer rows, ranks and turns

One process, one random model of Phi-3's shape (768 x 12), random adapters on all linear layers, greedy, no
stop token: every side computes the same number of tokens. The sides run in turns, and a ratio is the median
over the turns. What is measured, and why it is fair: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import torch
from machine import machine, versions
from transformers import Phi3Config, Phi3ForCausalLM

from phinetune.generation.engine import Engine, Limits
from phinetune.generation.request import Request
from phinetune.lora.attach import LoraSettings, linear_layers
from phinetune.lora.weights import AdapterWeights, Update
from phinetune.models import attention, device
from phinetune.models.loading import Base

PROMPT_TOKENS = 96
NEW_TOKENS = 64
NUM_ADAPTERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Rows that are answered at once, and the rank of their adapters."""

    num_rows: int
    rank: int


def config() -> Phi3Config:
    return Phi3Config(
        vocab_size=32_064,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=4096,
        pad_token_id=0,
    )


def random_model(dtype: torch.dtype, on: torch.device) -> Any:
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config()).to(dtype=dtype, device=on)
    return model.requires_grad_(False).eval()


def random_adapter(model: Any, rank: int, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, layer in linear_layers(model).items():
        out_features, in_features = layer.weight.shape
        updates[name] = Update(
            a_RI=torch.randn(rank, in_features, generator=generator) / in_features**0.5,
            b_OR=torch.randn(out_features, rank, generator=generator) * 0.02,
            scaling=1.0,
        )
    return AdapterWeights(updates=updates, settings=LoraSettings(rank=rank, alpha=rank))


def random_prompts(num: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randint(10, 32_000, (PROMPT_TOKENS,), generator=generator).tolist()) for _ in range(num)
    ]


class Ours:
    """The engine, with all adapters loaded."""

    def __init__(self, base: Base, adapters: list[AdapterWeights]) -> None:
        # Nothing is kept of earlier turns: every side reads its prompts.
        self.engine = Engine(base, Limits(prefix_cache_bytes=0))
        for index, weights in enumerate(adapters):
            self.engine.load(f"adapter-{index}", weights)

    def answer(self, prompts: list[tuple[int, ...]], names: list[str | None]) -> list[list[int]]:
        rows = [
            self.engine.submit(Request(prompt=prompt, max_new_tokens=NEW_TOKENS, adapter=name))
            for prompt, name in zip(prompts, names, strict=True)
        ]
        while not self.engine.is_idle:
            self.engine.step()
        return [row.tokens for row in rows]

    def first_token_s(self, prompts: list[tuple[int, ...]]) -> tuple[float, float]:
        """Time to the first token of one more request: alone, and while the others decode."""
        times = []
        for others in ([], prompts[:-1]):
            rows = [self.engine.submit(Request(prompt=p, max_new_tokens=NEW_TOKENS)) for p in others]
            while not all(row.tokens for row in rows):
                self.engine.step()
            began = time.perf_counter()
            late = self.engine.submit(Request(prompt=prompts[-1], max_new_tokens=NEW_TOKENS))
            while not late.tokens:
                self.engine.step()
            times.append(time.perf_counter() - began)
            for row in [*rows, late]:
                self.engine.cancel(row)
        return times[0], times[1]


class Peft:
    """PEFT's `generate(adapter_names=...)` on a model of its own with the same weights."""

    def __init__(self, model: Any, adapters: list[AdapterWeights]) -> None:
        import peft

        model.set_attn_implementation("sdpa")
        for index, weights in enumerate(adapters):
            settings = peft.LoraConfig(
                r=weights.settings.rank,
                lora_alpha=weights.settings.alpha,
                target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            )
            name = f"adapter-{index}"
            if index == 0:
                self.model = peft.get_peft_model(model, settings, adapter_name=name)
            else:
                self.model.add_adapter(name, settings)
            for path, update in weights.updates.items():
                layer = self.model.base_model.model.get_submodule(path)
                layer.lora_A[name].weight.data.copy_(update.a_RI)
                layer.lora_B[name].weight.data.copy_(update.b_OR)
        self.model.to(model.dtype).eval()

    @torch.inference_mode()
    def answer(self, prompts: list[tuple[int, ...]], names: list[str | None]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self.model.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=[name or "__base__" for name in names],
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return rows


def seconds(work: Callable[[], list[list[int]]], num_rows: int) -> float:
    began = time.perf_counter()
    answers = work()
    took = time.perf_counter() - began
    assert [len(answer) for answer in answers] == [NEW_TOKENS] * num_rows
    return took


def measure(case: Case, compute: device.Compute, num_turns: int) -> dict[str, Any]:
    """Tokens per second of each side, and the ratios of the turns."""
    model = random_model(compute.dtype, compute.device)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    base = Base(
        name="random",
        folder=Path(),
        model=model,
        sha256="",
        compute=compute,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    adapters = [random_adapter(model, case.rank, seed) for seed in range(min(NUM_ADAPTERS, case.num_rows))]
    ours, peft = (
        Ours(base, adapters),
        Peft(random_model(compute.dtype, compute.device), adapters),
    )
    prompts = random_prompts(case.num_rows)
    mixed: list[str | None] = [f"adapter-{index % len(adapters)}" for index in range(case.num_rows)]
    nobody: list[str | None] = [None] * case.num_rows

    def one_by_one() -> list[list[int]]:
        pairs = zip(prompts, mixed, strict=True)
        return [ours.answer([prompt], [name])[0] for prompt, name in pairs]

    sides: dict[str, Callable[[], list[list[int]]]] = {
        "mixed": lambda: ours.answer(prompts, mixed),
        "base": lambda: ours.answer(prompts, nobody),
        "peft": lambda: peft.answer(prompts, mixed),
        "sequential": one_by_one,
    }
    agree = share_equal(sides["mixed"](), sides["peft"]())  # also the warm-up of both
    sides["base"]()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_turns):
        for name, work in sides.items():
            times[name].append(seconds(work, case.num_rows))
    first = [ours.first_token_s(prompts) for _ in range(num_turns)] if case.num_rows > 1 else []
    num_tokens = case.num_rows * NEW_TOKENS
    return {
        "rows": case.num_rows,
        "rank": case.rank,
        "adapters": len(adapters),
        "tokens_per_second": {name: num_tokens / statistics.median(taken) for name, taken in times.items()},
        "mixed_over_base": ratio(times["base"], times["mixed"]),
        "mixed_over_sequential": ratio(times["sequential"], times["mixed"]),
        "mixed_over_peft": ratio(times["peft"], times["mixed"]),
        "tokens_equal_to_peft": agree,
        "first_token_s": {
            "alone": statistics.median(alone for alone, _ in first) if first else None,
            "while_others_decode": statistics.median(beside for _, beside in first) if first else None,
        },
        "seconds": times,
    }


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(slow, fast, strict=True))


def share_equal(left: list[list[int]], right: list[list[int]]) -> float:
    pairs = [(one, other) for a, b in zip(left, right, strict=True) for one, other in zip(a, b, strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    options = parser.parse_args()
    compute = device.choose("auto", options.dtype)
    main_case = Case(num_rows=8, rank=16)
    cases = [main_case]
    if not options.quick:
        cases += [Case(num_rows=rows, rank=16) for rows in (1, 2, 16, 32)]
        cases += [Case(num_rows=8, rank=rank) for rank in (8, 32, 64)]
    results = []
    for case in cases:
        results.append(measure(case, compute, 2 if options.quick or case is not main_case else 5))
        say(results[-1])
    head = results[0]
    report = {
        "mixed_over_base": head["mixed_over_base"],
        "mixed_over_sequential": head["mixed_over_sequential"],
        "mixed_over_peft": head["mixed_over_peft"],
        "rows": results,
        "compute": compute.reason,
        "machine": machine(torch.get_num_threads()),
        "versions": versions(("phinetune", "torch", "transformers", "peft")),
    }
    if options.json:
        print(json.dumps(report, indent=1))


def say(result: dict[str, Any]) -> None:
    speeds = "  ".join(f"{name} {speed:7.1f}" for name, speed in result["tokens_per_second"].items())
    print(
        f"{result['rows']:3} rows, rank {result['rank']:2}: {speeds} tokens/s; mixed is "
        f"{result['mixed_over_base']:.2f} x base, {result['mixed_over_sequential']:.2f} x one by one, "
        f"{result['mixed_over_peft']:.2f} x PEFT; {result['tokens_equal_to_peft']:.0%} of the tokens equal",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
