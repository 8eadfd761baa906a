"""Pre-train the demo base on two CPU cores, in stretches that can be stopped and resumed; export its weights.

Usage:
  PHINETUNE_DATA=... python tools/pretrain_demo.py --state DIR --finish-at 01:48
  python tools/pretrain_demo.py --state DIR --export src/phinetune/models/demo
Touch DIR/cool-down to begin the cool-down now. The tokenizer comes from tools/train_demo_tokenizer.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from demo_text import skills
from demo_text.corpora import SOURCES, common_words
from demo_text.rendering import Renderer, as_array
from demo_train import checkpoint
from demo_train.batches import FixedStream, FreshStream, Mixer, RandomRepeats, Stream, Tokens
from demo_train.model import IGNORED, build, config, generation_config, loss_sum
from demo_train.muon import Muon
from demo_train.probes import Probe
from safetensors.torch import save_file
from torch.optim import AdamW, Optimizer
from transformers import Phi3ForCausalLM

TOKENIZER = Path(__file__).parent.parent / "src" / "phinetune" / "models" / "demo"
LENGTH = 512
MICRO_ROWS = 8
MICRO_BATCHES = 2
WARM_UP_STEPS = 60
MUON_LR = 0.01
ADAMW_LR = 4e-3
COPY_FIRST_TOKENS = 4_000_000
CHUNK_TOKENS = 400_000
CONTROL_IDS = 6


def mix(tokens_seen: int) -> dict[str, float]:
    """Share of each stream, in percent: much repetition at first, then real text and skills."""
    early = tokens_seen < COPY_FIRST_TOKENS
    generated = (
        {"random": 12.0, "repetition": 28.0, "skills": 12.0}
        if early
        else {"random": 2.0, "repetition": 5.0, "skills": 30.0}
    )
    left = 100.0 - sum(generated.values())
    total = sum(source.weight for source in SOURCES)
    return generated | {source.name: left * source.weight / total for source in SOURCES}


def make_streams(state: Path, data: Path, renderer: Renderer, seeds: dict[str, int]) -> dict[str, Stream]:
    """Corpora from their token files (written on first use) and the generators."""
    streams: dict[str, Stream] = {"random": RandomRepeats(CONTROL_IDS, renderer.vocab_size)}
    for source in SOURCES:
        path = state / "tokens" / f"{source.name}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            ids, starts = as_array(renderer.render(source.documents(data)))
            np.savez(path, ids=ids, starts=starts)
            print(f"{source.name}: {len(ids):,} tokens, {len(starts):,} documents", flush=True)
        with np.load(path) as saved:
            streams[source.name] = FixedStream(saved["ids"], saved["starts"])
    real = common_words(data)
    for offset, (name, table) in enumerate((("repetition", skills.REPETITION), ("skills", skills.SKILLS))):

        def make(seed: int, table: dict[skills.Generator, float] = table) -> Tokens:
            return as_array(renderer.render(skills.documents(table, seed, real)), limit=CHUNK_TOKENS)

        streams[name] = FreshStream(make, seeds.get(name, 1_000_000 * (offset + 1)))
    return streams


def held_out(data: Path, renderer: Renderer) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Plain English kept out of training, end to end: half TinyStories."""
    story = next(source for source in SOURCES if source.name == "tinystories")
    books = next(source for source in SOURCES if source.name == "children-books")
    parts = [
        as_array(renderer.render(s.documents(data, held_out=True)), limit=24 * 513)[0][: 24 * 513]
        for s in (story, books)
    ]
    return np.concatenate(parts)


def make_optimisers(model: Phi3ForCausalLM) -> dict[str, Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    parts = {"qkv_proj.weight": 3, "gate_up_proj.weight": 2}
    hidden = []
    others = []
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            hidden.append((weight, next((n for end, n in parts.items() if name.endswith(end)), 1)))
        else:
            others.append(weight)
    return {
        "muon": Muon(hidden, lr=MUON_LR),
        "adamw": AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.01),
    }


def deadline(clock: str) -> float:
    """The next time the clock shows `HH:MM`, in seconds since the epoch."""
    now = datetime.now()
    hour, minute = map(int, clock.split(":"))
    then = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return (then if then > now else then + timedelta(days=1)).timestamp()


class Schedule:
    """Warm-up, constant, linear cool-down; the cool-down ends at a wall-clock time."""

    def __init__(self, finish_at: float, cool_down_share: float, state: Path) -> None:
        self._began, self._finish_at = time.time(), finish_at
        self._share, self._signal = cool_down_share, state / "cool-down"
        self._cooling_from: float | None = None

    def factor(self, step: int) -> float:
        """Multiplier of the learning rates; 0 means the end."""
        now = time.time()
        whole = self._finish_at - self._began
        if self._cooling_from is None and self._signal.exists():
            self._cooling_from, self._finish_at = now, now + self._share * whole
        if self._cooling_from is None and now > self._finish_at - self._share * whole:
            self._cooling_from = now
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        if self._cooling_from is None:
            return warm
        return warm * max(0.0, (self._finish_at - now) / max(self._finish_at - self._cooling_from, 1.0))


def train(state: Path, data: Path, finish_at: float, cool_down_share: float, compiled: bool) -> None:
    """Run until the schedule ends; a checkpoint every few minutes and at the end."""
    renderer = Renderer(TOKENIZER / "tokenizer.json")
    model = build(config(renderer.vocab_size, renderer.end_of_text, renderer.pad))
    optimisers = make_optimisers(model)
    progress = checkpoint.load(state, model, optimisers)
    mixer = Mixer(
        make_streams(state, data, renderer, progress.seeds), np.random.default_rng([progress.step, 5])
    )
    probe = Probe(renderer, held_out(data, renderer))
    schedule = Schedule(finish_at, cool_down_share, state)
    step_loss = torch.compile(loss_sum) if compiled else loss_sum
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {progress.step}", flush=True)
    clock, losses, since = time.time(), [], 0
    base_lr = {"muon": MUON_LR, "adamw": ADAMW_LR}
    while (factor := schedule.factor(progress.step)) > 0:
        weights = mix(progress.tokens)
        total = 0.0
        micro = [mixer.rows(MICRO_ROWS, LENGTH, weights) for _ in range(MICRO_BATCHES)]
        counted = sum(int((targets != IGNORED).sum()) for _, targets, _ in micro)
        for ids, targets, drawn in micro:
            loss = step_loss(model, ids, targets) / counted
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            for name, rows in drawn.items():
                progress.rows[name] = progress.rows.get(name, 0) + rows
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for kind, optimiser in optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = base_lr[kind] * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        progress.step += 1
        tokens = MICRO_ROWS * MICRO_BATCHES * LENGTH
        progress.tokens += tokens
        since += tokens
        losses.append(total)
        if progress.step % 50 == 0:
            speed = since / (time.time() - clock)
            now = datetime.now().strftime("%H:%M:%S")
            print(
                f"{now} step {progress.step} tokens {progress.tokens:,} loss {np.mean(losses):.3f} "
                f"lr x{factor:.2f} {speed:,.0f} tok/s",
                flush=True,
            )
            clock, losses, since = time.time(), [], 0
        if progress.step % 250 == 0:
            _measure_and_save(state, model, optimisers, progress, probe, mixer)
            clock = time.time()
    _measure_and_save(state, model, optimisers, progress, probe, mixer)
    print("finished", flush=True)


def _measure_and_save(
    state: Path,
    model: Phi3ForCausalLM,
    optimisers: dict[str, Optimizer],
    progress: checkpoint.Progress,
    probe: Probe,
    mixer: Mixer,
) -> None:
    result = probe.run(model)
    progress.probes.append({"step": progress.step, "tokens": progress.tokens, **asdict(result)})
    progress.seeds = {name: s.next_seed for name, s in mixer.streams.items() if isinstance(s, FreshStream)}
    checkpoint.save(state, model, optimisers, progress)
    print(f"  probe at {progress.tokens:,}: {result.line()}", flush=True)


def export(state: Path, out: Path) -> None:
    """The newest checkpoint as bf16 weights with both configs, as `AutoModelForCausalLM` loads them."""
    renderer = Renderer(TOKENIZER / "tokenizer.json")
    model = build(config(renderer.vocab_size, renderer.end_of_text, renderer.pad))
    progress = checkpoint.load(state, model, make_optimisers(model))
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.named_parameters()
    }
    save_file(weights, out / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.part", out / "model.safetensors")
    model.config.architectures = ["Phi3ForCausalLM"]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(out)
    generation_config(renderer.end_of_text, renderer.end, renderer.pad).save_pretrained(out)
    print(f"exported step {progress.step}, {progress.tokens:,} tokens, to {out}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", type=Path, default=Path(".pretrain"), help="checkpoints and token files")
    parser.add_argument("--finish-at", metavar="HH:MM", help="wall-clock time at which the cool-down ends")
    parser.add_argument(
        "--cool-down-share", type=float, default=0.3, help="share of this stretch spent cooling down"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="write the newest checkpoint's weights and leave"
    )
    args = parser.parse_args()
    if args.export:
        export(args.state, args.export)
        return
    if not args.finish_at or "PHINETUNE_DATA" not in os.environ:
        parser.error("training needs --finish-at and the environment variable PHINETUNE_DATA")
    torch.set_num_threads(2)
    train(
        args.state,
        Path(os.environ["PHINETUNE_DATA"]),
        deadline(args.finish_at),
        args.cool_down_share,
        not args.no_compile,
    )


if __name__ == "__main__":
    main()
