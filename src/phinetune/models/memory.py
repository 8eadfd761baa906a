"""Forecast the peak memory of a training step, and measure what a process really held.

The forecast counts what the engine keeps: weights, adapter with gradient and optimizer state, the
activations that wait for the backward pass, one chunk of logits. Knows nothing of data or settings.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn

from phinetune.models.loading import Base
from phinetune.models.loss import CHUNK_ENTRIES
from phinetune.models.quantized import CPU_TILE_WEIGHTS, GPU_TILE_WEIGHTS, QuantizedLinear

# What a process holds before any model: interpreter, torch, transformers and thread arenas.
PROCESS_BYTES = 420e6


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The largest piece of work that is held at once."""

    num_tokens: int
    num_trained_tokens: int
    longest_segment: int
    has_dropout: bool
    is_checkpointed: bool


def forecast_bytes(base: Base, num_adapter_parameters: int, shape: StepShape) -> int:
    """Peak bytes of a training step of this shape on this base."""
    config = base.model.config
    hidden = int(config.hidden_size)
    inter = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    layers = int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    item = torch.finfo(base.dtype).bits // 8
    tokens = shape.num_tokens

    weights = weight_bytes(base.model)
    adapter = num_adapter_parameters * 4 * 4  # weights, gradient, two moments
    # Two norms keep x in float32 and its scaled copy; attention keeps q, k, v and its output twice;
    # the gated MLP keeps both halves, the activation and the product.
    per_layer = tokens * (hidden * (2 * 4 + 9 * item) + inter * 5 * item)
    if shape.longest_segment < 192:
        per_layer += tokens * shape.longest_segment * heads * (item + 4)
    if shape.has_dropout:
        per_layer += tokens * (3 * hidden + inter)
    activations = per_layer * layers
    if shape.is_checkpointed:
        activations = tokens * hidden * item * layers + per_layer
    vocab = base.vocab_size
    chunk = min(CHUNK_ENTRIES, shape.num_trained_tokens * vocab) * (2 * 4 + item)
    working = tokens * (2 * inter + 4 * hidden) * (item + 4)
    if base.quantize != "none":
        largest = CPU_TILE_WEIGHTS if base.device.type == "cpu" else GPU_TILE_WEIGHTS
        working += largest * (item + 1)
    process = PROCESS_BYTES if base.device.type == "cpu" else 0.0
    return int(process + weights + adapter + activations + max(chunk, working))


def weight_bytes(model: nn.Module) -> int:
    """The bytes of a model's frozen weights as they are kept, quantised ones among them."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    codes = [
        code for layer in model.modules() if isinstance(layer, QuantizedLinear) for code in layer.buffers()
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*frozen, *codes))


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The largest resident size this process has had."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
