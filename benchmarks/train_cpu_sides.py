"""One training run of `train_cpu.py` in its own process: ours, or TRL with PEFT in one of its forms.

    python train_cpu_sides.py FOLDER SIDE NUM_STEPS DROPOUT_SEED

prints one JSON object: per step seconds, CPU seconds, loss and tokens; peak memory of the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train_cpu_work import TARGETS, Row, Work, prepare, read_rows

# What each form of TRL changes against SFTConfig's defaults. `dtype` is that of the loaded weights.
PEERS: Mapping[str, Mapping[str, Any]] = {
    # use_cpu is the least that lets the defaults start without a GPU: bfloat16 autocast over float32
    # weights, gradient checkpointing, padded batches.
    "default": {},
    "float32": {"bf16": False, "gradient_checkpointing": False},
    "autocast": {"gradient_checkpointing": False},
    "bf16": {"dtype": "bfloat16", "bf16": False, "gradient_checkpointing": False},
    "bf16-autocast": {"dtype": "bfloat16", "gradient_checkpointing": False},
    "bf16-autocast-sorted": {"dtype": "bfloat16", "gradient_checkpointing": False, "accumulate": 4},
    "bf16-padding-free": {
        "dtype": "bfloat16",
        "gradient_checkpointing": False,
        "padding_free": True,
        "max_length": None,
    },
    "bf16-padding-free-accumulated": {
        "dtype": "bfloat16",
        "gradient_checkpointing": False,
        "padding_free": True,
        "max_length": None,
        "accumulate": 4,
    },
}


class Record:
    """What happened in each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []

    def begin(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self._wall)
        self.cpu_seconds.append(time.process_time() - self._cpu)

    @property
    def values(self) -> dict[str, list[float]]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "losses": self.losses}


def ours(folder: Path, num_steps: int, dropout_seed: int) -> dict[str, Any]:
    """`train_step` as our users get it: type and attention as the machine suggests."""
    import numpy as np

    from phinetune.data.conversation import Source
    from phinetune.lora.files import load_adapter
    from phinetune.models.loading import load_base
    from phinetune.models.memory import peak_resident_bytes
    from phinetune.text.render import Rendered
    from phinetune.training.optimizers import make_optimizer
    from phinetune.training.settings import TrainingSettings
    from phinetune.training.step import train_step

    work = Work.read(folder)
    rows = [
        Rendered(
            ids=np.array(row.ids, dtype=np.int32),
            trained=np.arange(len(row.ids)) >= row.num_prompt,
            source=Source(file="made-up", line=line),
        )
        for line, row in enumerate(read_rows(folder), start=1)
    ]
    base = load_base(str(folder / "model"), device_name="cpu")
    adapter = load_adapter(base.model, folder / "adapter")
    settings = TrainingSettings(
        varied_seqlen=True,
        finetune_train_batch_size=work.rows_per_step,
        learning_rate=work.learning_rate,
        adam_beta1=work.beta1,
        adam_beta2=work.beta2,
        max_grad_norm=work.max_grad_norm,
        lora_dropout=work.dropout,
    )
    base.model.train()
    optimizer = make_optimizer(adapter, settings)
    record = Record()
    for step in range(num_steps):
        chosen = [(row,) for row in range(step * work.rows_per_step, (step + 1) * work.rows_per_step)]
        record.begin()
        result = train_step(
            base,
            adapter,
            optimizer,
            rows,
            chosen,
            settings,
            dropout_seed=1000 * dropout_seed + step,
            step=step + 1,
        )
        record.end()
        record.losses.append(result.loss)
    peak = peak_resident_bytes()
    gemm = _gemm_seconds(base, adapter, settings, rows, num_steps, work)
    return {**record.values, "peak_bytes": peak, "gemm_seconds": gemm, "compute": base.compute.reason}


def _gemm_seconds(
    base: Any, adapter: Any, settings: Any, rows: list[Any], num_steps: int, work: Work
) -> list[float]:
    """Seconds of the bare bfloat16 matrix products of each step: the floor below which no step can go.

    Forward and input gradient of every adapted layer and of the head on the trained tokens, and the six
    small products of each layer's adapter; in the last block's MLP on the trained tokens only, since no
    others have to be computed. Attention is not counted.
    """
    import torch

    from phinetune.training.step import pieces

    layers = []
    for name, layer in adapter.layers.items():
        is_spared = f"layers.{work.num_layers - 1}.mlp." in name
        weights = (layer.weight_OI.bfloat16(), layer.lora_A.bfloat16(), layer.lora_B.bfloat16())
        layers.append((is_spared, *weights))
    head = base.head.weight.bfloat16()
    seconds = []
    for step in range(num_steps):
        chosen = [(row,) for row in range(step * work.rows_per_step, (step + 1) * work.rows_per_step)]
        total = 0.0
        for piece in pieces(chosen, rows, settings.finetune_train_batch_size, True):
            num_tokens = sum(rows[row].num_tokens for row in piece)
            num_trained = sum(rows[row].num_trained for row in piece)
            sizes = {size for _, weight, _, _ in layers for size in weight.shape}
            all_rows = {size: torch.randn(num_tokens, size).bfloat16() for size in sizes}
            hidden = torch.randn(num_trained, head.shape[1]).bfloat16()
            # The first pass prepares shapes that training shares with nothing here; it is not counted.
            for is_counted in (False, True):
                start = time.perf_counter()
                for index, (is_spared, weight, a, b) in enumerate(layers):
                    dy, x = (all_rows[size][: num_trained if is_spared else None] for size in weight.shape)
                    torch.nn.functional.linear(x, weight)
                    if index:  # nothing before the first layer learns
                        dy @ weight
                    u = x @ a.t()
                    u @ b.t()
                    du = dy @ b
                    dy.t() @ u
                    du.t() @ x
                    du @ a
                logits = torch.nn.functional.linear(hidden, head)
                logits @ head
                total += is_counted * (time.perf_counter() - start)
        seconds.append(total)
    return seconds


def peer(folder: Path, name: str, num_steps: int, dropout_seed: int) -> dict[str, Any]:
    """TRL's SFTTrainer with PEFT, on the same rows in the same steps, from the same adapter."""
    import logging
    import resource
    import warnings

    import torch
    from datasets import Dataset, disable_progress_bars  # type: ignore[import-untyped]
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    work = Work.read(folder)
    options = dict(PEERS[name])
    accumulate = options.pop("accumulate", 1)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=getattr(torch, options.pop("dtype", "float32"))
    )
    rows = read_rows(folder)[: num_steps * work.rows_per_step]
    if accumulate > 1:  # rows of like length share a forward pass, within the same update
        rows = _sorted_in_steps(rows, work.rows_per_step)
    data = Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]})
    record = Record()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            record.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            record.end()

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                record.losses.append(logs["loss"])

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            per_device_train_batch_size=work.rows_per_step // accumulate,
            gradient_accumulation_steps=accumulate,
            max_steps=num_steps,
            train_sampling_strategy="sequential",
            learning_rate=work.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=work.beta1,
            adam_beta2=work.beta2,
            max_grad_norm=work.max_grad_norm,
            seed=dropout_seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Clock()],
        peft_config=LoraConfig(
            r=work.rank,
            lora_alpha=work.alpha,
            lora_dropout=work.dropout,
            target_modules=list(TARGETS),
            task_type="CAUSAL_LM",
        ),
    )
    loaded: Any = set_peft_model_state_dict(
        trainer.model, load_file(folder / "adapter" / "adapter_model.safetensors")
    )
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**record.values, "peak_bytes": peak if sys.platform == "darwin" else peak * 1024}


def _sorted_in_steps(rows: list[Row], rows_per_step: int) -> list[Row]:
    out: list[Row] = []
    for start in range(0, len(rows), rows_per_step):
        out += sorted(rows[start : start + rows_per_step], key=lambda row: len(row.ids))
    return out


def main() -> None:
    folder, side, num_steps, dropout_seed = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])
    out = os.fdopen(os.dup(1), "w")  # the trainer prints its logs; they go to standard error
    os.dup2(2, 1)
    if side == "prepare":
        prepare(folder)
        result: dict[str, Any] = {}
    elif side == "ours":
        result = ours(folder, num_steps, dropout_seed)
    else:
        result = peer(folder, side, num_steps, dropout_seed)
    out.write(json.dumps(result) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
