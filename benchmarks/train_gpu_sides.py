"""One side of `train_gpu.py` in a process of its own: phinetune, or transformers with PEFT.

    python train_gpu_sides.py '{"side": "ours", …}'     prints one JSON object

Every side has the same random base, the same first adapter and the same rows.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

RANK, ALPHA = 16, 32.0
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
NOT_TRAINED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Phi-3."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocab: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each adapted layer of a block."""
        return {
            "qkv_proj": (self.hidden, 3 * self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_up_proj": (self.hidden, 2 * self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    def flops(self, lengths: Sequence[int], num_trained: int) -> float:
        """Of a step's model: 4 per weight and token in frozen linears, attention counted causally (forward
        once, backward two and a half times), the head on trained tokens. No adapter, no padding."""
        weights = self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        attention = 14 * self.layers * self.hidden * pairs
        return 4.0 * weights * sum(lengths) + attention + 4.0 * self.hidden * self.vocab * num_trained


PHI3_MINI = Shape(hidden=3072, inner=8192, layers=32, heads=32, vocab=32_064)
TINY = Shape(hidden=64, inner=160, layers=2, heads=2, vocab=512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process does."""

    side: str
    device: str
    is_tiny: bool
    lengths: list[int]
    trained_share: float
    num_steps: int
    num_blocks: int
    num_warmup_steps: int
    compile_backend: str

    @property
    def shape(self) -> Shape:
        return TINY if self.is_tiny else PHI3_MINI

    @property
    def padded_tokens(self) -> int:
        """What goes through the model at once, at most."""
        return max(sum(self.lengths), max(self.lengths))

    def num_prompt(self, length: int) -> int:
        return length - max(1, round(self.trained_share * (length - 1)))


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    device = torch.device(task.device)
    step = {"ours": _ours, "peft-eager": _peft, "peft-compiled": _peft}[task.side](task, device)
    print(json.dumps({**asdict(task), **_timed(task, device, step)}))


def _timed(task: Task, device: torch.device, step: Callable[[int], float | Tensor]) -> dict[str, Any]:
    """Warm up, then blocks of steps with one synchronisation at each end."""
    began = time.perf_counter()
    first_loss = float(step(0))
    first_s = time.perf_counter() - began
    for number in range(1, task.num_warmup_steps):
        step(number)
    _reset_peak(device)
    blocks, number, loss = [], task.num_warmup_steps, 0.0
    for _ in range(task.num_blocks):
        _finish(device)
        began = time.perf_counter()
        for _ in range(task.num_steps):
            last = step(number)
            number += 1
        _finish(device)
        blocks.append((time.perf_counter() - began) / task.num_steps)
        loss = float(last)
    seconds = statistics.median(blocks)
    num_trained = sum(length - task.num_prompt(length) for length in task.lengths)
    flops = task.shape.flops(task.lengths, num_trained)
    return {
        "first_loss": first_loss,
        "last_loss": loss,
        "first_step_seconds": first_s,
        "block_seconds": blocks,
        "seconds_per_step": seconds,
        "tokens_per_second": sum(task.lengths) / seconds,
        "trained_tokens_per_second": num_trained / seconds,
        "model_tflops": flops / seconds / 1e12,
        "peak_memory_bytes": _peak(device),
        "num_host_syncs_per_step": _host_syncs(device, lambda: step(number)),
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def _host_syncs(device: torch.device, step: Callable[[], object]) -> int | None:
    """How often one step makes the host wait for the device; None where there is no device to wait for."""
    if device.type != "cuda":
        return None
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(entry.message) for entry in caught)


def _base(task: Task, device: torch.device) -> Phi3ForCausalLM:
    """Random weights in bfloat16, the same for every side."""
    shape = task.shape
    config = Phi3Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=4096, original_max_position_embeddings=4096, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False, sliding_window=None, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        torch.set_default_dtype(torch.bfloat16)
        model = Phi3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    return model


def _ids(task: Task) -> list[list[int]]:
    """Rows of random tokens, never zeros: a GPU is faster on those."""
    chance = torch.Generator().manual_seed(1)
    high = task.shape.vocab
    return [torch.randint(3, high, (length,), generator=chance).tolist() for length in task.lengths]


@torch.no_grad()
def _fill(name: str, weight: Tensor) -> None:
    """The first adapter: by the name of the layer and the part, so that it is the same on every side."""
    chance = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weight.copy_(torch.randn(weight.shape, generator=chance) * 0.02)


def _ours(task: Task, device: torch.device) -> Callable[[int], float]:
    import numpy as np

    from phinetune.data.conversation import Source
    from phinetune.lora.attach import LoraSettings, attach
    from phinetune.models import attention
    from phinetune.models.device import Compute
    from phinetune.models.loading import Base
    from phinetune.text.render import Rendered
    from phinetune.training.loop import start
    from phinetune.training.packing import Sequences, pack
    from phinetune.training.settings import TrainingSettings
    from phinetune.training.step import train_step

    model = _base(task, device)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    base = Base(
        name="random",
        folder=Path(),
        model=model,
        sha256="",
        compute=Compute(device=device, dtype=torch.bfloat16, reason="benchmark"),
        num_parameters=sum(weight.numel() for weight in model.parameters()),
    )
    adapter = attach(model, LoraSettings(rank=RANK, alpha=ALPHA, target_modules=TARGETS), seed=0)
    for name, weight in adapter.named_parameters():
        _fill(name, weight)
    seqlen = max(2048 if not task.is_tiny else 64, max(task.lengths))
    settings = TrainingSettings(
        finetune_train_seqlen=seqlen,
        finetune_train_batch_size=len(task.lengths),
        learning_rate=1e-4,
        lora_dropout=0.0,
    )
    state = start(base, adapter, settings)
    rows = [
        Rendered(
            ids=np.array(ids, np.int32),
            trained=np.arange(len(ids)) >= task.num_prompt(len(ids)),
            source=Source(file="made up", line=line),
        )
        for line, ids in enumerate(_ids(task), start=1)
    ]
    sequences = list(Sequences(pack(range(len(rows)), task.lengths, seqlen)))

    def step(number: int) -> float:
        result = train_step(
            base, adapter, state.optimizer, rows, sequences, settings, dropout_seed=number, step=number
        )
        return result.loss

    return step


def _peft(task: Task, device: torch.device) -> Callable[[int], Tensor]:
    from peft import LoraConfig, get_peft_model

    base = _base(task, device)
    base.set_attn_implementation("sdpa")
    config = LoraConfig(
        r=RANK,
        lora_alpha=int(ALPHA),
        lora_dropout=0.0,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    learnt = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    for name, weight in learnt:
        _fill(_our_name(name), weight)
    if task.side == "peft-compiled":
        for layer in base.model.layers:
            # Padded batches have few shapes; full rows have one.
            layer.compile(backend=task.compile_backend, dynamic=False)
    model.train()
    weights = [weight for _, weight in learnt]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batches = list(_padded(task, device))
    num_trained = sum(int((labels[:, 1:] != NOT_TRAINED).sum()) for _, _, labels in batches)

    def step(number: int) -> Tensor:
        total = torch.zeros((), device=device)
        for ids, mask, labels in batches:
            # num_items_in_batch makes it a sum divided by the step's trained tokens, as ours is.
            loss = model(
                input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=num_trained
            ).loss
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _our_name(name: str) -> str:
    """`base_model.model.<layer>.lora_A.default.weight` → `<layer>.lora_A`."""
    return name.removeprefix("base_model.model.").removesuffix(".default.weight")


def _padded(task: Task, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Rows sorted by length and padded, as many at once as hold the tokens of the whole step: the peers'
    best form. Without a mask where nothing is padded."""
    rows = sorted(_ids(task), key=len, reverse=True)
    while rows:
        count = max(1, min(len(rows), task.padded_tokens // len(rows[0])))
        group, rows = rows[:count], rows[count:]
        width = len(group[0])
        ids, labels = torch.zeros(count, width, dtype=torch.long), torch.full((count, width), NOT_TRAINED)
        mask = torch.zeros(count, width, dtype=torch.long)
        for place, row in enumerate(group):
            tokens, first = torch.tensor(row), task.num_prompt(len(row))
            ids[place, : len(row)], mask[place, : len(row)] = tokens, 1
            labels[place, first : len(row)] = tokens[first:]
        is_full = bool(mask.all())
        yield ids.to(device), None if is_full else mask.to(device), labels.to(device)


if __name__ == "__main__":
    main()
