"""Keys and values of all rows that are alive, one slot each, and attention over them.

A step lays the tokens of all its rows end to end. `StepAttention` writes their keys and values into
the slots and lets every token see its own row's, up to itself. Knows nothing of requests or adapters.

# S slots, C capacity in tokens, H query heads, K key-value heads, T tokens of the step, D head size
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Rows of unlike length attended together are padded to the longest; beyond this share of padding they
# are attended one by one.
MAX_PADDED_SHARE = 2.0
# Capacities and padded lengths are multiples of this, so that few different shapes come up.
LENGTH_MULTIPLE = 32


SlotContent = dict[int, tuple[Tensor, Tensor]]


class KeyValueCache:
    """One (S, K, C, D) tensor of keys and one of values per layer, made when the layer first writes."""

    def __init__(self) -> None:
        self.num_slots = self.capacity = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def ensure(self, num_slots: int, capacity: int) -> None:
        """Make room for so many slots of so many tokens; what is in them stays."""
        capacity = -(-capacity // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        if num_slots <= self.num_slots and capacity <= self.capacity:
            return
        num_slots, capacity = max(num_slots, self.num_slots), max(capacity, self.capacity)
        for index, (keys, values) in self._layers.items():
            self._layers[index] = (_grown(keys, num_slots, capacity), _grown(values, num_slots, capacity))
        self.num_slots, self.capacity = num_slots, capacity

    def clear(self) -> None:
        """Give the memory back."""
        self._layers.clear()
        self.num_slots = self.capacity = 0

    def layer(self, index: int, like_KTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (S, K, C, D) each."""
        if index not in self._layers:
            heads, _, size = like_KTD.shape
            shape = (self.num_slots, heads, self.capacity, size)
            self._layers[index] = (like_KTD.new_zeros(shape), like_KTD.new_zeros(shape))
        return self._layers[index]

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy what a slot holds into another one."""
        for pair in self._layers.values():
            for tensor in pair:
                tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]

    def read(self, slot: int, num_tokens: int) -> SlotContent:
        """A copy of a slot's first tokens: keys and values of each layer, (K, n, D)."""
        return {
            index: (keys[slot, :, :num_tokens].clone(), values[slot, :, :num_tokens].clone())
            for index, (keys, values) in self._layers.items()
        }

    def write(self, slot: int, content: SlotContent, num_tokens: int) -> None:
        """The first tokens of what `read` gave, into a slot."""
        for index, (keys, values) in content.items():
            keys_SKCD, values_SKCD = self.layer(index, keys)
            keys_SKCD[slot, :, :num_tokens] = keys[:, :num_tokens]
            values_SKCD[slot, :, :num_tokens] = values[:, :num_tokens]


def _grown(old_SKCD: Tensor, num_slots: int, capacity: int) -> Tensor:
    slots, heads, length, size = old_SKCD.shape
    new_SKCD = old_SKCD.new_zeros(num_slots, heads, capacity, size)
    new_SKCD[:slots, :, :length] = old_SKCD
    return new_SKCD


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Neighbouring tokens of one row: where they stand in the step, and in their row."""

    slot: int
    first: int
    position: int
    length: int

    @property
    def end(self) -> int:
        """The row's tokens up to and with these."""
        return self.position + self.length


class StepAttention:
    """The attention of one step: single tokens of rows that decode first, then chunks of prompts."""

    def __init__(self, cache: KeyValueCache, singles: Sequence[Span], chunks: Sequence[Span]) -> None:
        self._cache, self._singles, self._chunks = cache, singles, chunks
        spans = [*singles, *chunks]
        # Index tensors are made at once: every layer needs the same ones.
        self._slots_T = torch.tensor([span.slot for span in spans for _ in range(span.length)])
        self._positions_T = torch.tensor([span.position + i for span in spans for i in range(span.length)])
        self._num_tokens = len(self._slots_T)
        self._masks: dict[int | None, Tensor] = {}
        self._num_rows = max((span.slot for span in singles), default=-1) + 1
        longest = max((span.end for span in singles), default=0)
        self._padded = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, cache.capacity)
        is_close = self._num_rows * self._padded <= MAX_PADDED_SHARE * sum(span.end for span in singles) + 512
        self._is_batched = len(singles) > 1 and is_close

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
    ) -> Tensor:
        """(T, H, D); tokens that belong to no row (padding of the step) get zeros."""
        keys_SKCD, values_SKCD = self._cache.layer(layer, k_KTD)
        n = self._num_tokens
        keys_SKCD[self._slots_T, :, self._positions_T] = k_KTD[:, :n].transpose(0, 1)
        values_SKCD[self._slots_T, :, self._positions_T] = v_KTD[:, :n].transpose(0, 1)
        out_THD = q_HTD.new_zeros(q_HTD.shape[1], q_HTD.shape[0], q_HTD.shape[2])
        if self._is_batched:
            out_THD[: len(self._singles)] = self._decoded(
                q_HTD, keys_SKCD, values_SKCD, scale, window, softcap
            )
        for span in self._chunks if self._is_batched else (*self._singles, *self._chunks):
            q = q_HTD[None, :, span.first : span.first + span.length]
            k, v = (x[span.slot : span.slot + 1, :, : span.end] for x in (keys_SKCD, values_SKCD))
            sees_all = window is None and (span.position == 0 or span.length == 1)
            mask = None if sees_all else _visible(span, window, q.device)
            out = _attended(q, k, v, mask, scale, softcap)
            out_THD[span.first : span.first + span.length] = out[0].transpose(0, 1)
        return out_THD

    def _decoded(
        self,
        q_HTD: Tensor,
        keys_SKCD: Tensor,
        values_SKCD: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """One token of each decoding row, (B, H, D), padded to the longest row."""
        num, rows, padded = len(self._singles), self._num_rows, self._padded
        slots_B = self._slots_T[:num]
        q_SHD = q_HTD.new_zeros(rows, q_HTD.shape[0], q_HTD.shape[2])
        q_SHD[slots_B] = q_HTD[:, :num].transpose(0, 1)
        if window not in self._masks:
            self._masks[window] = self._visible_to_singles(window, q_HTD.device)
        out = _attended(
            q_SHD[:, :, None],
            keys_SKCD[:rows, :, :padded],
            values_SKCD[:rows, :, :padded],
            self._masks[window],
            scale,
            softcap,
        )
        return out[slots_B, :, 0]

    def _visible_to_singles(self, window: int | None, device: torch.device) -> Tensor:
        """(S, 1, 1, L): true where the slot's token may look; slots that do not decode look at place 0."""
        position_S = torch.zeros(self._num_rows, dtype=torch.long)
        position_S[self._slots_T[: len(self._singles)]] = self._positions_T[: len(self._singles)]
        place_L = torch.arange(self._padded)
        visible_SL = place_L <= position_S[:, None]
        if window is not None:
            visible_SL &= place_L > position_S[:, None] - window
        return visible_SL[:, None, None].to(device)


def _visible(span: Span, window: int | None, device: torch.device) -> Tensor:
    """(n, end): true where a token of the span may look at a token of its row."""
    row_N = torch.arange(span.position, span.end, device=device)[:, None]
    place_M = torch.arange(span.end, device=device)
    visible_NM = place_M <= row_N
    return visible_NM if window is None else visible_NM & (place_M > row_N - window)


def _attended(
    q_SHND: Tensor,
    k_SKMD: Tensor,
    v_SKMD: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of a few rows, (S, H, N, D); no mask means that the last query sees the last key."""
    is_causal = mask is None and q_SHND.shape[2] > 1
    if not softcap:
        return scaled_dot_product_attention(
            q_SHND,
            k_SKMD,
            v_SKMD,
            attn_mask=mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=q_SHND.shape[1] != k_SKMD.shape[1],
        )
    groups = q_SHND.shape[1] // k_SKMD.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k_SKMD, v_SKMD))
    scores = softcap * torch.tanh(q_SHND @ k.transpose(-1, -2) * (scale / softcap))
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, dim=-1) @ v
