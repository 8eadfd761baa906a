"""Attention in which each segment of a packed batch sees only itself, and the prefix it continues.

Registered with transformers as the attention implementation `segments`, so that model code stays as
it is; what is a segment travels as keywords of the model's forward. transformers builds no mask for an
implementation it has no mask function for, which is what a packed batch wants.
Knows nothing of examples or adapters.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from phinetune.kernels.attention import Options, tile_attention_for
from phinetune.kernels.calls import kernels_for
from phinetune.models.amx_attention import AmxAttention
from phinetune.models.attention_tiles import placed
from phinetune.models.plain_attention import PlainAttention, Shape, hidden

IMPLEMENTATION = "segments"

# On a CPU in bfloat16, segments shorter than this are faster by plain matrix products than by the flash
# kernel, with our kernels between the products and without; in float32 the flash kernel is as fast at every
# length (benchmarks/attention_cpu.py).
PLAIN_WITH_KERNELS_BELOW = 640
PLAIN_MATH_BELOW = 384
PLAIN_MATH_DTYPES = (torch.bfloat16,)
# In tile registers all lengths are faster than by either, but what is kept of the scores' gradients grows
# with the square: 17 MB a thread for so many tokens. A batch with a longer segment goes the other ways.
TILES_UP_TO = 4096


class CachedAttention(Protocol):
    """Attention over keys and values kept from earlier steps: (H, T, D) and (K, T, D) in, (T, H, D) out."""

    def __call__(
        self,
        layer: int,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor: ...


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: tuple[int, ...] | None = None,
    segment_prefixes: tuple[int | None, ...] = (),
    cached: CachedAttention | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, and over all of the one that `segment_prefixes` names for it.

    # B = 1, H query heads, K key-value heads, T tokens of all segments, D head size
    query (1, H, T, D), key and value (1, K, T, D); returns (1, T, H, D), as transformers expects.
    With `cached`, tokens of answers see the keys and values it keeps instead.
    """
    if cached is not None:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        out_THD = cached(
            layer, query[0], key[0], value[0], scale=scale, window=sliding_window, softcap=softcap
        )
        return out_THD[None], None
    lengths = segment_lengths or (query.shape[2],)
    assert query.shape[0] == 1
    assert attention_mask is None
    assert sum(lengths) == query.shape[2]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    segments = placed(lengths, segment_prefixes)
    # The gradient of query[0] would be a copy among zeros.
    inputs = [tensor.squeeze(0) for tensor in (query, key, value)]
    is_tiled = not dropout and max(segment.end for segment in segments) <= TILES_UP_TO
    if is_tiled and tile_attention_for(query) is not None:
        options = Options(scale=scale, window=sliding_window, softcap=softcap)
        out: Tensor = AmxAttention.apply(*inputs, segments, options)  # type: ignore[no-untyped-call]
        return out[None], None
    plain_below: float = 0
    if softcap:
        plain_below = math.inf
    elif query.device.type == "cpu" and query.dtype in PLAIN_MATH_DTYPES:
        plain_below = PLAIN_WITH_KERNELS_BELOW if kernels_for(query) else PLAIN_MATH_BELOW
    if dropout:
        plain_below = 0
    # The kernel knows no prefix but through a mask, with which it is slow in bfloat16.
    is_plain = [bool(s.end < plain_below or (plain_below and s.prefix_length)) for s in segments]
    outputs: list[Tensor] = []
    if any(is_plain):
        chosen = tuple(itertools.compress(segments, is_plain))
        shape = Shape(segments=chosen, scale=scale, window=sliding_window, softcap=softcap)
        out = PlainAttention.apply(*inputs, shape)  # type: ignore[no-untyped-call]
        if all(is_plain):
            return out[None], None
        outputs = list(out[None].split(lengths, dim=1))
    q, k, v = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    for index in range(len(lengths)):
        if is_plain[index]:
            continue
        prefix = segment_prefixes[index] if segment_prefixes else None
        keys, values = (x[index] if prefix is None else torch.cat([x[prefix], x[index]], 2) for x in (k, v))
        out = _fused_attention(q[index], keys, values, scale, sliding_window, softcap, dropout)
        outputs[index : index + 1] = [out]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """PyTorch's kernel on one segment, whose keys may begin with a prefix's: (1, H, L, D) to (1, L, H, D)."""
    groups, length, num_keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if groups > 1:
        k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    if softcap:  # which the kernel does not know
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
        scores = scores.masked_fill(hidden(num_keys - length, num_keys, window, q.device), -math.inf)
        shares = torch.dropout(torch.softmax(scores, dim=-1), dropout, train=dropout > 0)
        return (shares @ v).transpose(1, 2)
    mask = None
    if length < num_keys or (window and window < length):
        mask = ~hidden(num_keys - length, num_keys, window, q.device)
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
    )
    return out.transpose(1, 2)


AttentionInterface.register(IMPLEMENTATION, segment_attention)
