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
from dataclasses import asdict, dataclass
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
from demo_train.copying_start import set_copying_start
from demo_train.model import IGNORED, build, config, generation_config, loss_sum
from demo_train.muon import Muon
from demo_train.probes import Probe
from demo_train.workers import Group, joined, start
from safetensors.torch import save_file
from torch.optim import AdamW, Optimizer
from transformers import Phi3ForCausalLM

TOKENIZER = Path(__file__).parent.parent / "src" / "phinetune" / "models" / "demo"
LENGTH = 512
MICRO_ROWS = 4
WARM_UP_STEPS = 100
BASE_LR = {"muon": 3e-3, "adamw": 2e-3}
NOT_YET_COPYING = {"random": 45.0, "repetition": 30.0, "skills": 13.0}
COPYING = {"random": 2.0, "repetition": 8.0, "skills": 40.0}
COPIES_FROM = 0.8  # accuracy per token on repeating unseen words
PROBE_STEPS = 200
CHUNK_TOKENS = 400_000
CONTROL_IDS = 6
SEEDS_PER_WORKER = 400_000


def mix(copies: bool) -> dict[str, float]:
    """Share of each stream in the rows, in percent: mostly repetition until the model copies unseen words.

    A row of generated text has far fewer tokens that count in the loss than a row of real text.
    """
    generated = COPYING if copies else NOT_YET_COPYING
    left = 100.0 - sum(generated.values())
    total = sum(source.weight for source in SOURCES)
    return generated | {source.name: left * source.weight / total for source in SOURCES}


def make_streams(
    state: Path, data: Path, renderer: Renderer, seeds: dict[str, int], rank: int
) -> dict[str, Stream]:
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

        streams[name] = FreshStream(make, seeds.get(name, 1_000_000 * (offset + 1) + SEEDS_PER_WORKER * rank))
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
        "muon": Muon(hidden, lr=BASE_LR["muon"]),
        "adamw": AdamW(others, lr=BASE_LR["adamw"], betas=(0.9, 0.95), weight_decay=0.01),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One stretch of training; picklable, so that each worker process gets it."""

    state: Path
    data: Path
    finish_at: float
    cool_down_share: float
    workers: int

    def __call__(self, rank: int) -> None:
        """Train as worker `rank`."""
        torch.set_num_threads(1)
        with joined(rank, self.workers, self.state.absolute() / "meeting-point") as group:
            train(self, group)


def train(job: Job, group: Group) -> None:
    """Run until the schedule ends; a checkpoint every few minutes and at the end."""
    renderer = Renderer(TOKENIZER / "tokenizer.json")
    model = build(config(renderer.vocab_size, renderer.end_of_text, renderer.pad))
    set_copying_start(model, [renderer.decode([i]) for i in range(renderer.vocab_size)])
    optimisers = make_optimisers(model)
    progress = checkpoint.load(job.state, model, optimisers)
    muon = optimisers["muon"]
    assert isinstance(muon, Muon)
    muon.owned = (group.rank, group.size)
    seeds = {name: seed + SEEDS_PER_WORKER * group.rank for name, seed in progress.seeds.items()}
    rng = np.random.default_rng([progress.step, 5, group.rank])
    mixer = Mixer(make_streams(job.state, job.data, renderer, seeds, group.rank), rng)
    probe = Probe(renderer, held_out(job.data, renderer)) if group.leads else None
    schedule = Schedule(job.finish_at, job.cool_down_share, job.state)
    step_loss = torch.compile(loss_sum)
    weights = list(model.parameters())
    if group.leads:
        print(f"{sum(p.numel() for p in weights):,} parameters, from step {progress.step}", flush=True)
    copies = group.agree(progress.copying()) >= COPIES_FROM
    clock, losses = time.time(), list[float]()
    while (factor := group.agree(schedule.factor(progress.step))) > 0:
        ids, targets, drawn = mixer.rows(MICRO_ROWS, LENGTH, mix(copies))
        loss = step_loss(model, ids, targets)
        loss.backward()
        sums = torch.tensor([loss.item(), float((targets != IGNORED).sum())])
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        group.add_up([sums, *gradients])
        for gradient in gradients:
            gradient.div_(sums[1])
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        _update(optimisers, factor)
        group.share([weight for g in muon.param_groups for weight in g["params"]])
        progress.step += 1
        progress.tokens += group.size * MICRO_ROWS * LENGTH
        for name, rows in drawn.items():
            progress.rows[name] = progress.rows.get(name, 0) + rows * group.size
        losses.append(float(sums[0] / sums[1]))
        if progress.step % 50 == 0 and group.leads:
            speed = len(losses) * group.size * MICRO_ROWS * LENGTH / (time.time() - clock)
            print(
                f"{datetime.now():%H:%M:%S} step {progress.step} tokens {progress.tokens:,} "
                f"loss {np.mean(losses):.3f} lr x{factor:.2f} {speed:,.0f} tok/s",
                flush=True,
            )
            clock, losses = time.time(), []
        if progress.step % PROBE_STEPS == 0:
            _measure_and_save(job.state, model, optimisers, progress, probe, mixer, group)
            copies = copies or group.agree(progress.copying()) >= COPIES_FROM
            clock = time.time()
    _measure_and_save(job.state, model, optimisers, progress, probe, mixer, group)


def _update(optimisers: dict[str, Optimizer], factor: float) -> None:
    for kind, optimiser in optimisers.items():
        for settings in optimiser.param_groups:
            settings["lr"] = BASE_LR[kind] * factor
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def _measure_and_save(
    state: Path,
    model: Phi3ForCausalLM,
    optimisers: dict[str, Optimizer],
    progress: checkpoint.Progress,
    probe: Probe | None,
    mixer: Mixer,
    group: Group,
) -> None:
    """Every process takes part in gathering the momenta; the leading one measures and writes."""
    muon = optimisers["muon"]
    matrices = [weight for g in muon.param_groups for weight in g["params"]]
    for weight in matrices:
        muon.state[weight].setdefault("momentum", torch.zeros_like(weight))
    group.share([muon.state[weight]["momentum"] for weight in matrices])
    if probe is None:
        return
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
    (out / "model.safetensors.part").chmod(0o644)
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
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="write the newest checkpoint's weights and leave"
    )
    args = parser.parse_args()
    if args.export:
        export(args.state, args.export)
        return
    if not args.finish_at or "PHINETUNE_DATA" not in os.environ:
        parser.error("training needs --finish-at and the environment variable PHINETUNE_DATA")
    job = Job(
        state=args.state,
        data=Path(os.environ["PHINETUNE_DATA"]),
        finish_at=deadline(args.finish_at),
        cool_down_share=args.cool_down_share,
        workers=args.workers,
    )
    start(args.workers, args.state.absolute() / "meeting-point", job)
    print("finished", flush=True)


if __name__ == "__main__":
    main()
