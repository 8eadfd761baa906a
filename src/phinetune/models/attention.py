"""Attention in which each segment of a packed batch sees only itself.

Registered with transformers as the attention implementation `segments`, so that model code stays as
it is; the segment lengths travel as a keyword of the model's forward. transformers builds no mask for
an implementation it has no mask function for, which is what a packed batch wants.
Knows nothing of examples or adapters.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

IMPLEMENTATION = "segments"

# On a CPU in bfloat16, segments shorter than this are faster by plain matrix products than by the flash
# kernel; in float32 the kernel is faster at every length (benchmarks/attention_cpu.py).
PLAIN_MATH_BELOW = 384
PLAIN_MATH_DTYPES = (torch.bfloat16,)
# Rows of queries worked on at once: keys after a block's last row are never multiplied.
BLOCK_ROWS = 128
# Segments up to this length are computed together, padded to the longest of their group; of one and a half
# times the length of the shortest at most. Padding stands at the end, where causal attention cannot see it.
GROUP_UP_TO = 160
GROUP_SPREAD = 1.5


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
    cached: CachedAttention | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

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
    if softcap:
        plain_below = max(lengths) + 1
    else:
        is_plain = query.device.type == "cpu" and query.dtype in PLAIN_MATH_DTYPES
        plain_below = PLAIN_MATH_BELOW if is_plain else 0
    if dropout:
        plain_below = 0
    runs = _runs(lengths, plain_below)
    tokens = [sum(run.lengths) for run in runs]
    parts = zip(*(tensor.split(tokens, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for run, (q, k, v) in zip(runs, parts, strict=True):
        if run.is_plain:
            shape = _Shape(lengths=run.lengths, scale=scale, window=sliding_window, softcap=softcap)
            out: Tensor = _PlainAttention.apply(q[0], k[0], v[0], shape)
            outputs.append(out[None])
        else:
            outputs.append(_fused_attention(q, k, v, scale, sliding_window, softcap, dropout))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring segments that are computed the same way; a long one stands alone."""

    lengths: tuple[int, ...]
    is_plain: bool


def _runs(lengths: tuple[int, ...], plain_below: int) -> tuple[_Run, ...]:
    runs: list[_Run] = []
    for length in lengths:
        is_plain = length < plain_below
        if is_plain and runs and runs[-1].is_plain:
            runs[-1] = _Run((*runs[-1].lengths, length), True)
        else:
            runs.append(_Run((length,), is_plain))
    return tuple(runs)


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """PyTorch's kernel on one segment: (1, H, L, D) in, (1, L, H, D) out."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    if groups > 1:
        k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    if softcap:  # which the kernel does not know
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
        scores = scores.masked_fill(_hidden(0, length, 0, window, q.device), -math.inf)
        shares = torch.dropout(torch.softmax(scores, dim=-1), dropout, train=dropout > 0)
        return (shares @ v).transpose(1, 2)
    mask = None
    if window and window < length:
        mask = ~_hidden(0, length, 0, window, q.device)
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
    )
    return out.transpose(1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    lengths: tuple[int, ...]
    scale: float
    window: int | None
    softcap: float | None

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """First key, first row and end of each block of queries of the segments that stand alone."""
        for start, length in _placed(self.lengths):
            if length <= GROUP_UP_TO:
                continue
            for row in range(start, start + length, BLOCK_ROWS):
                first_key = start if self.window is None else max(start, row - self.window + 1)
                yield first_key, row, min(row + BLOCK_ROWS, start + length)


@dataclass(frozen=True, slots=True)
class _Group:
    """S segments padded to L tokens: `take_SL` reads a token of the batch for every place (any, for
    padding), `put_N` and `back_N` name the real tokens' places in the batch and in the group."""

    take_SL: Tensor
    put_N: Tensor
    back_N: Tensor

    def padded(self, x_HTD: Tensor) -> Tensor:
        """(H, T, D) as (H, S, L, D)."""
        num_segments, length = self.take_SL.shape
        return x_HTD.index_select(1, self.take_SL.flatten()).reshape(len(x_HTD), num_segments, length, -1)

    def unpadded(self, x_HSLD: Tensor) -> Tensor:
        """(H, S, L, D) as (H, N, D), without the padding."""
        return x_HSLD.flatten(1, 2).index_select(1, self.back_N)


def _placed(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Start and length of each segment."""
    return list(zip([0, *itertools.accumulate(lengths)], lengths, strict=False))


@functools.lru_cache(maxsize=8)  # every layer of a model asks for the same batch
def _groups(lengths: tuple[int, ...], device: torch.device) -> tuple[_Group, ...]:
    """The shorter segments, those of like length together."""
    short = sorted((length, start) for start, length in _placed(lengths) if length <= GROUP_UP_TO)
    groups = []
    while short:
        count = sum(length <= short[0][0] * GROUP_SPREAD for length, _ in short)
        groups.append(_group(short[:count], device))
        short = short[count:]
    return tuple(groups)


def _group(short: list[tuple[int, int]], device: torch.device) -> _Group:
    lengths, starts = (torch.tensor(column) for column in zip(*short, strict=True))
    # A multiple of 16, so that products of the same shape come again: each new shape has to be prepared.
    place_L = torch.arange(-(-int(lengths.max()) // 16) * 16)
    is_real_SL = place_L < lengths[:, None]
    take_SL = starts[:, None] + torch.minimum(place_L, lengths[:, None] - 1)
    back_N = is_real_SL.flatten().nonzero().squeeze(1)
    put_N = take_SL.flatten()[back_N]
    return _Group(take_SL.to(device), put_N.to(device), back_N.to(device))


class _PlainAttention(torch.autograd.Function):
    """Softmax attention by blocks of rows; probabilities are formed again in the backward pass.

    One function for all segments: slicing under autograd would build a gradient of full size for
    every slice. # g = H / K queries share a key head; N rows of a block, M keys it may see
    """

    @staticmethod
    def forward(ctx: Any, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, shape: _Shape) -> Tensor:
        heads, tokens, size = q_HTD.shape
        out_THD = q_HTD.new_empty(tokens, heads, size)
        for group in _groups(shape.lengths, q_HTD.device):
            q, k, v = group.padded(q_HTD), group.padded(k_KTD), group.padded(v_KTD)
            p_KSgLM, _ = _group_probabilities(q, k, shape)
            out = _ungrouped_heads(_grouped(p_KSgLM) @ v, heads)
            out_THD[group.put_N] = group.unpadded(out).transpose(0, 1)
        for key, row, end in shape.blocks():
            p_KgNM, _ = _probabilities(q_HTD, k_KTD, key, row, end, shape)
            out_THD[row:end] = _flat(_grouped(p_KgNM) @ v_KTD[:, key:end], heads).transpose(0, 1)
        ctx.save_for_backward(q_HTD, k_KTD, v_KTD)
        ctx.shape = shape
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_THD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_HTD, k_KTD, v_KTD = ctx.saved_tensors
        shape: _Shape = ctx.shape
        kv_heads = k_KTD.shape[0]
        dq_HTD, dk_KTD, dv_KTD = torch.empty_like(q_HTD), torch.zeros_like(k_KTD), torch.zeros_like(v_KTD)
        for group in _groups(shape.lengths, q_HTD.device):
            q, k, v = group.padded(q_HTD), group.padded(k_KTD), group.padded(v_KTD)
            # A padded row repeats the last token; its gradient is none.
            d_out = torch.zeros_like(q)
            d_out.flatten(1, 2)[:, group.back_N] = d_out_THD[group.put_N].transpose(0, 1)
            p_KSgLM, slope = _group_probabilities(q, k, shape)
            p = _grouped(p_KSgLM)
            d_out, q = _heads_of_keys(d_out, kv_heads), _heads_of_keys(q, kv_heads)
            ds = torch._softmax_backward_data(d_out @ v.transpose(-1, -2), p, -1, p.dtype).mul_(shape.scale)
            if slope is not None:
                ds *= _grouped(slope)
            dq = _ungrouped_heads(ds @ k, q_HTD.shape[0])
            dq_HTD[:, group.put_N] = group.unpadded(dq)
            dk_KTD[:, group.put_N] = group.unpadded(ds.transpose(-1, -2) @ q)
            dv_KTD[:, group.put_N] = group.unpadded(p.transpose(-1, -2) @ d_out)
        for key, row, end in shape.blocks():
            p_KgNM, slope = _probabilities(q_HTD, k_KTD, key, row, end, shape)
            p_KRM = _grouped(p_KgNM)
            d_out_KRD = d_out_THD[row:end].transpose(0, 1).reshape(kv_heads, -1, q_HTD.shape[2])
            q_KRD = q_HTD[:, row:end].reshape(kv_heads, -1, q_HTD.shape[2])
            dv_KTD[:, key:end] += p_KRM.transpose(1, 2) @ d_out_KRD
            dp_KRM = d_out_KRD @ v_KTD[:, key:end].transpose(1, 2)
            ds_KRM = torch._softmax_backward_data(dp_KRM, p_KRM, -1, p_KRM.dtype).mul_(shape.scale)
            if slope is not None:
                ds_KRM *= _grouped(slope)
            dq_HTD[:, row:end] = _flat(ds_KRM @ k_KTD[:, key:end], q_HTD.shape[0])
            dk_KTD[:, key:end] += ds_KRM.transpose(1, 2) @ q_KRD
        return dq_HTD, dk_KTD, dv_KTD, None


def _probabilities(
    q_HTD: Tensor, k_KTD: Tensor, key: int, row: int, end: int, shape: _Shape
) -> tuple[Tensor, Tensor | None]:
    """Attention of rows row..end over keys key..end, and the slope of the soft cap if there is one."""
    kv_heads, num_rows = k_KTD.shape[0], end - row
    q_KRD = (q_HTD[:, row:end] * shape.scale).reshape(kv_heads, -1, q_HTD.shape[2])
    scores = (q_KRD @ k_KTD[:, key:end].transpose(1, 2)).view(kv_heads, -1, num_rows, end - key)
    slope = None
    if shape.softcap is not None:
        squashed = torch.tanh(scores / shape.softcap)
        scores, slope = squashed * shape.softcap, 1 - squashed**2
    if shape.window is None:  # only the last, square part of a block holds keys in the future
        scores[..., row - key :].masked_fill_(_hidden(0, num_rows, 0, None, scores.device), -math.inf)
    else:
        scores.masked_fill_(_hidden(row - key, end - key, 0, shape.window, scores.device), -math.inf)
    return torch.softmax(scores, dim=-1), slope


def _group_probabilities(q_HSLD: Tensor, k_KSLD: Tensor, shape: _Shape) -> tuple[Tensor, Tensor | None]:
    """Attention of every row of a group over the keys of its segment, (K, S, g, L, L)."""
    kv_heads, num_segments, length, _ = k_KSLD.shape
    q = _heads_of_keys(q_HSLD * shape.scale, kv_heads)
    scores = (q @ k_KSLD.transpose(-1, -2)).view(kv_heads, num_segments, -1, length, length)
    slope = None
    if shape.softcap is not None:
        squashed = torch.tanh(scores / shape.softcap)
        scores, slope = squashed * shape.softcap, 1 - squashed**2
    scores.masked_fill_(_hidden(0, length, 0, shape.window, scores.device), -math.inf)
    return torch.softmax(scores, dim=-1), slope


def _heads_of_keys(x_HSLD: Tensor, kv_heads: int) -> Tensor:
    """(H, S, L, D) as (K, S, g * L, D): the queries of a key head one below the other."""
    x_KgSLD = x_HSLD.view(kv_heads, -1, *x_HSLD.shape[1:])
    return x_KgSLD.transpose(1, 2).flatten(2, 3)


def _ungrouped_heads(x_KSRD: Tensor, heads: int) -> Tensor:
    """(K, S, g * L, D) as (H, S, L, D)."""
    kv_heads, num_segments, _, size = x_KSRD.shape
    x_KSgLD = x_KSRD.view(kv_heads, num_segments, heads // kv_heads, -1, size)
    return x_KSgLD.transpose(1, 2).flatten(0, 1)


def _grouped(x_KgNM: Tensor) -> Tensor:
    """(K, g, N, M) as (K, g * N, M), so that one product serves all queries of a key head."""
    return x_KgNM.flatten(-3, -2)


def _flat(x_KRD: Tensor, heads: int) -> Tensor:
    """(K, g * N, D) as (H, N, D)."""
    return x_KRD.view(heads, -1, x_KRD.shape[2])


@functools.lru_cache(maxsize=256)
def _hidden(first_row: int, end: int, first_key: int, window: int | None, device: torch.device) -> Tensor:
    """True where row (first_row..end) may not see key (first_key..end): later, or out of the window."""
    rows = torch.arange(first_row, end, device=device)[:, None]
    keys = torch.arange(first_key, end, device=device)[None]
    hidden = keys > rows
    return hidden if window is None else hidden | (keys <= rows - window)


AttentionInterface.register(IMPLEMENTATION, segment_attention)
