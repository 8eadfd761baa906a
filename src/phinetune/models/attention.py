"""Attention in which each segment of a packed batch sees only itself.

Registered with transformers as the attention implementation `segments`, so that model code stays as
it is; the segment lengths travel as a keyword of the model's forward. transformers builds no mask for
an implementation it has no mask function for, which is what a packed batch wants.
Knows nothing of examples or adapters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

IMPLEMENTATION = "segments"

# Below this length plain matrix products beat the CPU's flash kernel (benchmarks/attention_cpu.py).
PLAIN_MATH_BELOW = 192


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: tuple[int, ...] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

    # B = 1, H query heads, K key-value heads, T tokens of all segments, D head size
    query (1, H, T, D), key and value (1, K, T, D); returns (1, T, H, D), as transformers expects.
    """
    if segment_lengths is None:
        segment_lengths = (query.shape[2],)
    assert query.shape[0] == 1
    assert attention_mask is None
    assert sum(segment_lengths) == query.shape[2]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    groups = query.shape[1] // key.shape[1]
    outputs = []
    start = 0
    for length in segment_lengths:
        q, k, v = (tensor[:, :, start : start + length] for tensor in (query, key, value))
        start += length
        window = sliding_window if sliding_window and sliding_window < length else None
        if groups > 1:
            k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        is_plain = softcap is not None or (query.device.type == "cpu" and length < PLAIN_MATH_BELOW)
        if is_plain:
            out = _plain_attention(q, k, v, scale, window, softcap, dropout)
        else:
            mask = _causal_mask(length, window, q.device) if window else None
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
            )
        outputs.append(out.transpose(1, 2))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = _causal_mask(q.shape[2], window, q.device)
    scores = scores.masked_fill(~allowed, -math.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(nn.functional.dropout(weights, dropout), v)


def _causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query (row) may see a key: itself and earlier, at most `window` of them."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


AttentionInterface.register(IMPLEMENTATION, segment_attention)
