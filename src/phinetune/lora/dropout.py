"""Dropout masks that cost little: one bit an entry on a CPU, one byte elsewhere.

On a CPU an entry is kept if a random number of eight bits reaches a threshold. The numbers are compared 64 at
a time, bit plane by bit plane, so a mask comes out packed, 64 entries a word; it is applied to the bits of an
entry, which beats multiplying bfloat16 by bytes three times over. Kernels in C draw other masks than PyTorch.
Knows nothing of layers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from phinetune.kernels.calls import kernels_for

# A rate is rounded to 1/256: 0.1 becomes 0.1016.
BYTE_VALUES = 256
_WORD_BITS = 64
_BITS_AT_ONCE = 4
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def dropout_threshold(rate: float) -> int:
    """The number of byte values out of 256 that mean "drop" for a dropout rate; 0 only for a rate of 0.

    >>> dropout_threshold(0.1)
    26
    """
    return min(max(round(rate * BYTE_VALUES), rate > 0), BYTE_VALUES - 1)


def keep_mask(x: Tensor, threshold: int) -> Tensor:
    """A mask for `dropped`, from torch's global generator: an entry of `x` is dropped with probability
    threshold / 256. Packed bits on a CPU, bytes of 0 and 1 elsewhere."""
    shape, device = x.shape, x.device
    if kernels := kernels_for(x):
        return kernels.draw_mask(-(-x.numel() // _WORD_BITS), threshold)
    if device.type == "cpu":
        return _packed_mask(x.numel(), threshold)
    if device.type != "cuda":  # others lack 64-bit draws
        share_kept = 1 - threshold / BYTE_VALUES
        return torch.empty(shape, dtype=torch.uint8, device=device).bernoulli_(share_kept)
    num_entries = shape.numel()
    words = torch.empty((num_entries + 7) // 8, dtype=torch.int64, device=device)
    words.random_(-(2**63), None)
    return (words.view(torch.uint8)[:num_entries] >= threshold).view(torch.uint8).view(shape)


def drawn_mask(x: Tensor, threshold: int) -> tuple[Tensor | None, float]:
    """A mask for `dropped` (none for a threshold of 0), and by what to multiply what it keeps."""
    mask = keep_mask(x, threshold) if threshold else None
    return mask, BYTE_VALUES / (BYTE_VALUES - threshold)


def dropped(x: Tensor, mask: Tensor) -> Tensor:
    """A copy of `x` with the entries dropped that `mask` says."""
    if mask.dtype == torch.uint8:
        return x * mask
    x = x.contiguous()
    return _applied(x, mask, torch.empty_like(x))


def drop_(x: Tensor, mask: Tensor) -> Tensor:
    """The same in the place of `x`, which must be contiguous."""
    return x.mul_(mask) if mask.dtype == torch.uint8 else _applied(x, mask, x)


def _packed_mask(num_entries: int, threshold: int) -> Tensor:
    # number >= threshold, from the lowest bit up: where the threshold has a 1 the number needs one too and
    # the lower bits must reach theirs; where it has a 0, a 1 is enough. Zeros at the end decide nothing.
    lowest = (threshold & -threshold).bit_length() - 1
    num_words = -(-num_entries // _WORD_BITS)
    random = _random_words(8 - lowest, num_words)
    kept = random[0]
    for bit, drawn in enumerate(random[1:], start=lowest + 1):
        kept = kept.bitwise_and_(drawn) if threshold >> bit & 1 else kept.bitwise_or_(drawn)
    return kept.clone()


def _random_words(*shape: int) -> Tensor:
    """Words of 64 random bits, seeded by torch's generator: SFC64 draws them twice as fast as it would."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = np.random.SFC64(seed).random_raw(math.prod(shape))
    return torch.from_numpy(words.view(np.int64)).view(shape)


def _applied(x: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """Spread bits of the mask over whole entries; each bit of a word does for a sixteenth of `x`."""
    if kernels := kernels_for(x):
        return kernels.drop(x, mask, out)
    integer = _INTEGERS[x.dtype.itemsize]
    packed = mask.view(torch.int16)
    spread = torch.empty(_BITS_AT_ONCE, len(packed), dtype=torch.int16)
    sources, targets = (tensor.view(-1).view(integer).split(spread.numel()) for tensor in (x, out))
    shifts = torch.arange(16, dtype=torch.int16)[:, None].split(_BITS_AT_ONCE)
    for shift, source, target in zip(shifts, sources, targets, strict=False):
        torch.bitwise_left_shift(packed, shift, out=spread)
        spread.bitwise_right_shift_(15)  # the sign fills the entry
        torch.bitwise_and(source, spread.view(-1)[: len(source)].to(integer), out=target)
    return out
