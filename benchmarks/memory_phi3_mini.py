"""The memory that training needs on a base of Phi-3-mini's shape: in bfloat16, in 8 bits, in 4 bits.

    python benchmarks/memory_phi3_mini.py --folder DIR           write the model (7.6 GB) if need be, measure
    python benchmarks/memory_phi3_mini.py --folder DIR --clean    and delete it again
    python benchmarks/memory_phi3_mini.py --folder DIR --json     one JSON object

The weights are random: memory and time do not depend on them. Each kind trains in a process of its own,
LoRA r 16 on all linear layers of the blocks, one sequence of 512 tokens a step, with activations kept or
recomputed (gradient_checkpointing); what counts is the largest
resident size that the system has seen of the process (VmHWM), files mapped into memory included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine, measured_on, versions

HIDDEN, INTER, LAYERS, HEADS, VOCAB = 3_072, 8_192, 32, 32, 32_064
NUM_BYTES = 2 * (LAYERS * (HIDDEN * (4 * HIDDEN + 3 * INTER) + 2 * HIDDEN) + HIDDEN * (2 * VOCAB + 1))
SEQLEN, PROBED = 512, 128
KINDS = ("none", "int8", "nf4")
# What is measured: the base's form, with + where activations are recomputed (gradient_checkpointing: true).
FORMS = ("none", "none+", "int8+", "nf4", "nf4+")
GOAL_BYTES = {"none": 12e9, "nf4": 6e9}
PACKAGES = ("phinetune", "torch", "transformers", "bitsandbytes")


def main() -> None:
    options = _options()
    if options.child:
        kind = options.child.rstrip("+")
        print(json.dumps(_trained(options.folder, kind, options.child.endswith("+"), options.steps)))
        return
    _require_model(options.folder, options.layers)
    rows = []
    for form in options.forms.split(","):
        print(f"training on the base in {_title(form)} ...", file=sys.stderr, flush=True)
        rows.append(_in_a_child(options, form))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report = {
        "rows": rows,
        "machine": machine(0),
        "versions": versions(PACKAGES),
    }
    if options.clean:
        shutil.rmtree(options.folder)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="memory of training on a base of Phi-3-mini's shape")
    parser.add_argument("--folder", type=Path, required=True, help="where the model is, or is written")
    parser.add_argument("--layers", type=int, default=LAYERS, help="blocks of a model that is written")
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    parser.add_argument("--forms", default=",".join(FORMS), help="none, int8, nf4, each with + or without")
    parser.add_argument("--clean", action="store_true", help="delete the folder at the end")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _require_model(folder: Path, num_layers: int) -> None:
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < NUM_BYTES + 1e9:
        sys.exit(f"the model takes {NUM_BYTES / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free")
    print(f"writing {NUM_BYTES / 1e9:.1f} GB of random weights ...", file=sys.stderr, flush=True)
    # In a process of its own: a child inherits the largest size of the process that starts it.
    script = "import sys, memory_phi3_mini as m; m.write_model(m.Path(sys.argv[1]), int(sys.argv[2]))"
    command = [sys.executable, "-c", script, str(folder.resolve()), str(num_layers)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)


def write_model(folder: Path, num_layers: int) -> None:
    """Write the model two blocks at a time; config.json comes last, as the sign that all is there."""
    import torch
    from safetensors.torch import save_file
    from transformers import Phi3Config

    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}

    def drawn(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def write(number: int, tensors: dict[str, Any]) -> None:
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    write(0, {"model.embed_tokens.weight": drawn(VOCAB, HIDDEN)})
    for first in range(0, num_layers, 2):
        tensors = {}
        for layer in range(first, min(first + 2, num_layers)):
            name = f"model.layers.{layer}"
            tensors |= {
                f"{name}.self_attn.qkv_proj.weight": drawn(3 * HIDDEN, HIDDEN),
                f"{name}.self_attn.o_proj.weight": drawn(HIDDEN, HIDDEN),
                f"{name}.mlp.gate_up_proj.weight": drawn(2 * INTER, HIDDEN),
                f"{name}.mlp.down_proj.weight": drawn(HIDDEN, INTER),
                f"{name}.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
                f"{name}.post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            }
        write(first // 2 + 1, tensors)
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    write(num_layers // 2 + 2, {"model.norm.weight": norm, "lm_head.weight": drawn(VOCAB, HIDDEN)})
    index = {"metadata": {"total_size": NUM_BYTES}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Phi3ForCausalLM"],
    )
    config.save_pretrained(folder)


def _in_a_child(options: argparse.Namespace, form: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--folder", str(options.folder), "--steps", str(options.steps)]
    done = subprocess.run([*command, "--child", form], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{_title(form)} failed:\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _trained(folder: Path, kind: str, is_checkpointed: bool, num_steps: int) -> dict[str, Any]:
    """Load, attach, train; times and the largest resident size."""
    import numpy as np

    from phinetune.data.conversation import Source
    from phinetune.lora.attach import LoraSettings, attach
    from phinetune.models.batch import PackedBatch
    from phinetune.models.loading import load_base
    from phinetune.models.loss import trained_token_loss
    from phinetune.models.memory import Costs, StepShape, held_bytes, saved_bytes
    from phinetune.text.render import Rendered
    from phinetune.training.loop import start
    from phinetune.training.settings import TrainingSettings
    from phinetune.training.step import train_step

    settings = TrainingSettings(
        finetune_train_seqlen=SEQLEN,
        finetune_train_batch_size=1,
        lora_r=16,
        gradient_checkpointing=is_checkpointed,
    )
    began = time.perf_counter()
    base = load_base(str(folder), device_name="cpu", dtype="bfloat16", quantize=kind)  # type: ignore[arg-type]
    load_s = time.perf_counter() - began
    loaded_bytes = _largest_resident_bytes()
    shape = LoraSettings(rank=settings.lora_r, alpha=settings.lora_alpha, dropout=settings.lora_dropout)
    adapter = attach(base.model, shape, seed=0)
    rng = np.random.default_rng(0)
    trained = np.arange(SEQLEN) >= SEQLEN // 2
    rows = [
        Rendered(
            ids=rng.integers(3, 32_000, SEQLEN).astype(np.int32),
            trained=trained,
            source=Source(file="random", line=step + 1),
        )
        for step in range(num_steps)
    ]
    held = held_bytes(base.device)
    state = start(base, adapter, settings)
    seconds, losses = [], []
    for step in range(num_steps):
        began = time.perf_counter()
        result = train_step(
            base, adapter, state.optimizer, rows, [(step,)], settings, dropout_seed=step, step=step + 1
        )
        seconds.append(round(time.perf_counter() - began, 2))
        losses.append(result.loss)
    peak = _largest_resident_bytes()
    # Only now: what is looked at for the forecast must not be in the peak.
    for module in base.model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]
    few = Rendered(ids=rows[0].ids[:PROBED], trained=trained[-PROBED:], source=rows[0].source)
    probed = PackedBatch.lay([few])
    saved = saved_bytes(base, lambda: trained_token_loss(base, probed))
    costs = Costs.of(base, saved / PROBED, num_adapter_parameters=adapter.num_parameters, num_moments=2)
    shape_of_step = StepShape(num_tokens=SEQLEN, num_trained_tokens=SEQLEN // 2, longest_segment=SEQLEN)
    tensors = costs.kept() + costs.step(shape_of_step, is_checkpointed=is_checkpointed)
    expected = int(held + tensors + costs.around(tensors))
    return {
        "form": kind + ("+" if is_checkpointed else ""),
        "peak_bytes": peak,
        "peak_loading_bytes": loaded_bytes,
        "forecast_bytes": expected,
        "goal_bytes": GOAL_BYTES.get(kind),
        "load_s": round(load_s, 1),
        "step_s": seconds,
        "losses": losses,
        "parameters": base.num_parameters,
        "adapter_parameters": adapter.num_parameters,
    }


def _largest_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    from phinetune.models.memory import peak_resident_bytes

    return peak_resident_bytes()


def _title(form: str) -> str:
    kind = form.rstrip("+")
    return ("bfloat16" if kind == "none" else kind) + (", recomputed" if form.endswith("+") else "")


def _print(report: dict[str, Any]) -> None:
    print(f"{measured_on(report)}\n")
    print(f"{'base in':<22}{'peak GB':>9}{'goal':>7}{'forecast':>10}{'loading':>9}{'load s':>8}{'step s':>8}")
    for row in report["rows"]:
        goal = f"{row['goal_bytes'] / 1e9:.0f}" if row["goal_bytes"] else ""
        print(
            f"{_title(row['form']):<22}{row['peak_bytes'] / 1e9:>9.2f}{goal:>7}"
            f"{row['forecast_bytes'] / 1e9:>10.2f}{row['peak_loading_bytes'] / 1e9:>9.2f}"
            f"{row['load_s']:>8.1f}{min(row['step_s']):>8.1f}"
        )


if __name__ == "__main__":
    main()
