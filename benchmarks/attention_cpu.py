"""phinetune's attention in tile registers and by plain products against PyTorch's fused one on a CPU.

Forward and backward; tiles only where the processor has them (AMX).

    python benchmarks/attention_cpu.py [--threads N] [--heads 12] [--head-size 64]

The crossover of plain and fused belongs in `PLAIN_WITH_KERNELS_BELOW` of phinetune.models.attention, of a
machine without a C compiler in `PLAIN_MATH_BELOW`. A second table asks how the short segments of a packed
batch are best computed: all in our one function, one fused call each, one fused call with a block mask, or as
a batch of segments of equal length (which real chats are not). A third one compares rows that begin alike
with their rests after a shared prefix.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from phinetune.models import attention

LENGTHS = (32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 2048)
# Tokens of the prefix and of each rest, and how many rests.
PREFIXED = ((16, 40, 30), (60, 57, 17), (60, 300, 6), (60, 500, 4), (250, 700, 2), (1000, 50, 2))
NUM_TRIES = 9
LIMITS = ("PLAIN_WITH_KERNELS_BELOW", "PLAIN_MATH_BELOW")
NO_LENGTH, EVERY_LENGTH, AS_IN_TRAINING = 0, 1 << 30, -1


@contextlib.contextmanager
def plain_below(length: int) -> Iterator[None]:
    """Within the block attention is plain below a length and fused from there on, or as in training."""
    before = {name: getattr(attention, name) for name in (*LIMITS, "tile_attention_for")}
    if length != AS_IN_TRAINING:
        vars(attention).update(dict.fromkeys(LIMITS, length), tile_attention_for=lambda _: None)
    try:
        yield
    finally:
        vars(attention).update(before)


def milliseconds(attend: Callable[..., Tensor], inputs: Sequence[Tensor]) -> float:
    """The fastest of several tries of forward and backward: load on the machine only ever adds."""
    best = float("inf")
    for _ in range(NUM_TRIES):
        start = time.perf_counter()
        out = attend(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def segments(
    lengths: tuple[int, ...],
    inputs: Sequence[Tensor],
    below: int,
    prefixes: tuple[int | None, ...] = (),
) -> float:
    """Milliseconds of phinetune's attention over segments, plain below a length."""
    module = nn.Module()
    with plain_below(below):
        return milliseconds(
            lambda q, k, v: attention.segment_attention(
                module, q, k, v, None, segment_lengths=lengths, segment_prefixes=prefixes
            )[0],
            inputs,
        )


def drawn(batch: int, heads: int, length: int, head_size: int, dtype: torch.dtype) -> list[Tensor]:
    shape = (batch, heads, length, head_size)
    return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]


def crossover(heads: int, head_size: int, dtype: torch.dtype) -> None:
    print(f"\n{str(dtype).removeprefix('torch.')}, {heads} heads of {head_size}, milliseconds a segment")
    print(f"{'length':>8}{'plain':>10}{'fused':>10}{'plain/fused':>13}{'in training':>13}")
    for length in LENGTHS:
        inputs = drawn(1, heads, length, head_size, dtype)
        ours = segments((length,), inputs, EVERY_LENGTH)
        theirs = segments((length,), inputs, NO_LENGTH)
        now = segments((length,), inputs, AS_IN_TRAINING)
        print(f"{length:>8}{ours:>10.2f}{theirs:>10.2f}{ours / theirs:>13.2f}{now:>13.2f}")


def together(heads: int, head_size: int, dtype: torch.dtype, num_tokens: int) -> None:
    print(f"\n{num_tokens} tokens in equal segments, {str(dtype).removeprefix('torch.')}, milliseconds")
    print(f"{'length':>8}{'in training':>13}{'plain':>10}{'fused each':>12}", end="")
    print(f"{'fused, masked':>15}{'fused, batch':>14}")
    for length in (32, 64, 128, 256):
        count = num_tokens // length
        lengths = (length,) * count
        packed = drawn(1, heads, num_tokens, head_size, dtype)
        segment_T = torch.arange(num_tokens) // length
        allowed = (segment_T[:, None] == segment_T) & torch.ones(num_tokens, num_tokens).tril().bool()

        def masked(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor = allowed) -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=allowed)

        def batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True)

        print(
            f"{length:>8}{segments(lengths, packed, AS_IN_TRAINING):>13.1f}"
            f"{segments(lengths, packed, EVERY_LENGTH):>10.1f}"
            f"{segments(lengths, packed, NO_LENGTH):>12.1f}{milliseconds(masked, packed):>15.1f}"
            f"{milliseconds(batch, drawn(count, heads, length, head_size, dtype)):>14.1f}"
        )


def prefixed(heads: int, head_size: int, dtype: torch.dtype) -> None:
    """Attention alone: what the tokens that are not computed save elsewhere comes on top."""
    print(f"\n{str(dtype).removeprefix('torch.')}, milliseconds; as in training")
    print(f"{'prefix':>8}{'rest':>8}{'rows':>8}{'each':>10}{'shared':>10}{'by mask':>10}")
    below = AS_IN_TRAINING
    for prefix, rest, count in PREFIXED:
        lengths, prefixes = (rest,) * count + (prefix,), (count,) * count + (None,)
        each = drawn(1, heads, (prefix + rest) * count, head_size, dtype)
        shared = drawn(1, heads, sum(lengths), head_size, dtype)
        print(
            f"{prefix:>8}{rest:>8}{count:>8}{segments((prefix + rest,) * count, each, below):>10.1f}"
            f"{segments(lengths, shared, below, prefixes):>10.1f}"
            f"{segments(lengths, shared, NO_LENGTH, prefixes):>10.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="plain against fused attention on a CPU")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    has_tiles = attention.tile_attention_for(torch.zeros(1, dtype=torch.bfloat16)) is not None
    below = attention.PLAIN_WITH_KERNELS_BELOW
    used = "bfloat16 in tile registers" if has_tiles else f"plain is used below {below} tokens"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {used}")
    for dtype in (torch.bfloat16, torch.float32):
        crossover(options.heads, options.head_size, dtype)
    together(options.heads, options.head_size, torch.bfloat16, 2048)
    prefixed(options.heads, options.head_size, torch.bfloat16)


if __name__ == "__main__":
    main()
