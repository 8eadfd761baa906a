"""Where plain matrix products beat PyTorch's fused attention on a CPU, forward and backward.

    python benchmarks/attention_cpu.py [--threads N] [--heads 12] [--head-size 64]

Causal attention of one segment at a time, as training on packed chats does it. The crossover belongs
in `PLAIN_MATH_BELOW` of phinetune.models.attention. Two more tables ask whether short segments should
be computed together: as one batch of segments of equal length, or in one call with a block mask.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LENGTHS = (32, 64, 96, 128, 160, 192, 256, 384, 512, 768, 1024)
NUM_TRIES = 9


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention from two matrix products and a softmax; any leading axes."""
    length = q.shape[-2]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def milliseconds(attend: Callable[..., Tensor], inputs: Sequence[Tensor]) -> float:
    """The fastest of several tries of forward and backward: load on the machine only ever adds."""
    best = float("inf")
    for _ in range(NUM_TRIES):
        start = time.perf_counter()
        out = attend(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def drawn(batch: int, heads: int, length: int, head_size: int, dtype: torch.dtype) -> list[Tensor]:
    shape = (batch, heads, length, head_size)
    return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]


def crossover(heads: int, head_size: int, dtype: torch.dtype) -> None:
    print(f"\n{str(dtype).removeprefix('torch.')}, {heads} heads of {head_size}, milliseconds a segment")
    print(f"{'length':>8}{'plain':>10}{'fused':>10}{'plain/fused':>13}")
    last_won = 0
    for length in LENGTHS:
        inputs = drawn(1, heads, length, head_size, dtype)
        ours, theirs = milliseconds(plain, inputs), milliseconds(fused, inputs)
        last_won = length if ours < theirs else last_won
        print(f"{length:>8}{ours:>10.2f}{theirs:>10.2f}{ours / theirs:>13.2f}")
    print(f"plain wins up to {last_won}" if last_won else "plain never wins")


def together(heads: int, head_size: int, dtype: torch.dtype, num_tokens: int) -> None:
    """`num_tokens` tokens of equal segments: one by one, as a batch, and in one call with a mask."""
    print(f"\n{num_tokens} tokens in equal segments, {str(dtype).removeprefix('torch.')}, milliseconds")
    print(f"{'length':>8}{'one by one':>12}{'batch':>10}{'batch fused':>13}{'block mask':>12}")
    for length in (32, 64, 128, 256):
        count = num_tokens // length
        packed = drawn(1, heads, num_tokens, head_size, dtype)
        segment_T = torch.arange(num_tokens) // length
        allowed = (segment_T[:, None] == segment_T) & torch.ones(num_tokens, num_tokens).tril().bool()

        def one_by_one(q: Tensor, k: Tensor, v: Tensor, length: int = length) -> Tensor:
            parts = zip(*(tensor.split(length, dim=2) for tensor in (q, k, v)), strict=True)
            return torch.cat([plain(*part) for part in parts], dim=2)

        def masked(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor = allowed) -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=allowed)

        batch = drawn(count, heads, length, head_size, dtype)
        print(
            f"{length:>8}{milliseconds(one_by_one, packed):>12.1f}{milliseconds(plain, batch):>10.1f}"
            f"{milliseconds(fused, batch):>13.1f}{milliseconds(masked, packed):>12.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="plain against fused attention on a CPU")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for dtype in (torch.bfloat16, torch.float32):
        crossover(options.heads, options.head_size, dtype)
    together(options.heads, options.head_size, torch.bfloat16, 2048)


if __name__ == "__main__":
    main()
