"""Norm, gated activation and rotation of a decoder block on a CPU, each as one autograd function.

The same arithmetic as transformers' modules, in kernels of C where the machine could compile them.
Elsewhere it is worked through a block of rows at a time, which stays in the processor's cache between one
operation and the next; a whole tensor of activations would be read from and written to memory for each.
Backward keeps little and forms the rest anew.
Knows nothing of modules. # T tokens, W features of a token, H heads, D head size
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phinetune.kernels.calls import kernels_for

# Entries worked on at once: few enough for the cache, enough to hide what starting an operation costs.
BLOCK_ENTRIES = 1 << 17


def _blocks(x_TW: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ENTRIES // x_TW.shape[1])
    return (slice(start, start + rows) for start in range(0, len(x_TW), rows))


class _BranchNorm(torch.autograd.Function):
    """x + branch and its RMS norm, of any shape; the gradients of both paths meet in one pass.

    What it returns is no view of something else: FSDP2 would warn.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight_W: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.has_branch = branch is not None
        if kernels := kernels_for(x):
            branch = None if branch is None else branch.contiguous()
            past, out, inverse_T = kernels.norm(x.contiguous(), branch, weight_W, epsilon)
        else:
            past = x if branch is None else x + branch
            out, inverse_T = _norm(past, weight_W, epsilon)
        ctx.save_for_backward(past, weight_W, inverse_T)
        return past if ctx.has_branch else x.view_as(x), out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_past: Tensor | None, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        dx = d_past
        if d_out is not None:
            past, weight_W, inverse_T = ctx.saved_tensors
            d_past = None if d_past is None else d_past.contiguous()
            back = kernels.norm_back if (kernels := kernels_for(past)) else _norm_back
            dx = back(past.contiguous(), weight_W, inverse_T, d_out.contiguous(), d_past)
        return dx, dx if ctx.has_branch else None, None, None


def _norm(x: Tensor, weight_W: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of x, and 1 / root mean square of each row."""
    out = torch.empty(x.shape, dtype=x.dtype)
    x_TW, out_TW = x.reshape(-1, len(weight_W)), out.view(-1, len(weight_W))
    inverse_T = torch.empty(len(x_TW), dtype=torch.float32)
    for rows in _blocks(x_TW):
        part, inverse_T1 = x_TW[rows].float(), inverse_T[rows, None]
        torch.rsqrt(part.square().mean(-1, keepdim=True) + epsilon, out=inverse_T1)
        torch.mul(weight_W, (part * inverse_T1).to(x.dtype), out=out_TW[rows])
    return out, inverse_T


def _norm_back(
    x: Tensor, weight_W: Tensor, inverse_T: Tensor, d_out: Tensor, d_past: Tensor | None
) -> Tensor:
    weight, dx = weight_W.float(), torch.empty_like(x)
    x_TW, d_out_TW, dx_TW = (tensor.view(-1, len(weight)) for tensor in (x, d_out, dx))
    d_past_TW = None if d_past is None else d_past.view(x_TW.shape)
    for rows in _blocks(x_TW):
        inverse_T1 = inverse_T[rows, None]
        part = x_TW[rows] * inverse_T1  # bfloat16 times float32 is float32
        d = d_out_TW[rows] * weight
        share = (d * part).mean(-1, keepdim=True)
        d.addcmul_(part, share, value=-1).mul_(inverse_T1)
        if d_past_TW is not None:
            d += d_past_TW[rows]
        dx_TW[rows] = d
    return dx


def branch_norm(x: Tensor, branch: Tensor | None, weight_W: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + branch, for the path past a sublayer, and its RMS norm, both of the shape (..., W) of x.

    Without a branch x is as it is. The weight is frozen. Norms are formed in float32 and rounded to x's type
    before the weight.
    """
    past, out = _BranchNorm.apply(x, branch, weight_W, epsilon)  # type: ignore[no-untyped-call]
    return past, out


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TW: Tensor, up_TW: Tensor | None) -> Tensor:
        """`gate_TW` holds gate and up side by side where `up_TW` is None."""
        ctx.save_for_backward(gate_TW, up_TW)
        gate_TW, up_TW = _sides(gate_TW, up_TW)
        if kernels := kernels_for(gate_TW):
            return kernels.gate(gate_TW, up_TW)
        out_TW = torch.empty(gate_TW.shape, dtype=gate_TW.dtype)
        for rows in _blocks(gate_TW):
            torch.mul(up_TW[rows], torch.nn.functional.silu(gate_TW[rows]), out=out_TW[rows])
        return out_TW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TW: Tensor) -> tuple[Tensor, Tensor | None]:
        kept_gate, kept_up = ctx.saved_tensors
        d_kept_gate = torch.empty_like(kept_gate)
        d_kept_up = None if kept_up is None else torch.empty_like(kept_up)
        gate_TW, up_TW = _sides(kept_gate, kept_up)
        d_gate_TW, d_up_TW = _sides(d_kept_gate, d_kept_up)
        if kernels := kernels_for(gate_TW):
            kernels.gate_back(gate_TW, up_TW, d_out_TW.contiguous(), d_gate_TW, d_up_TW)
            return d_kept_gate, d_kept_up
        for rows in _blocks(gate_TW):
            gate, d_out = gate_TW[rows], d_out_TW[rows]
            torch.mul(d_out, torch.nn.functional.silu(gate), out=d_up_TW[rows])
            torch.ops.aten.silu_backward.grad_input(d_out * up_TW[rows], gate, grad_input=d_gate_TW[rows])
        return d_kept_gate, d_kept_up


def _sides(gate_TW: Tensor, up_TW: Tensor | None) -> tuple[Tensor, Tensor]:
    if up_TW is not None:
        return gate_TW, up_TW
    gate, up = gate_TW.chunk(2, dim=-1)
    return gate, up


def gated_silu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) · up, (..., W); without `up`, `gate` is (..., 2 W) and holds both, side by side."""
    flat = [None if side is None else side.reshape(-1, side.shape[-1]).contiguous() for side in (gate, up)]
    out_TW: Tensor = _GatedSilu.apply(*flat)  # type: ignore[no-untyped-call]
    return out_TW.view(*gate.shape[:-1], -1)


class _RotatedHeads(torch.autograd.Function):
    """Heads of query, key and value apart, those of query and key turned by their positions.

    Tables without columns turn nothing. # W = (H + 2 K) D features, R turned entries of a head
    """

    @staticmethod
    def forward(
        ctx: Any, x_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor, size: int, num_heads: int, kv_heads: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.widths = num_heads * size, kv_heads * size, kv_heads * size
        rotate = kernels.rotate if (kernels := kernels_for(x_TW)) else _rotate
        parts = zip(x_TW.split(ctx.widths, dim=1), _tables(cos_TR, sin_TR), strict=True)
        return tuple(rotate(part, *tables, size) for part, tables in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_out_HTD: Tensor) -> tuple[Tensor | None, ...]:
        dx_TW = torch.empty(d_out_HTD[0].shape[1], sum(ctx.widths), dtype=d_out_HTD[0].dtype)
        rotate_back = kernels.rotate_back if (kernels := kernels_for(dx_TW)) else _rotate_back
        parts = zip(d_out_HTD, dx_TW.split(ctx.widths, dim=1), _tables(*ctx.saved_tensors), strict=True)
        for d_part_HTD, dx_part_TW, tables in parts:
            rotate_back(d_part_HTD.contiguous(), *tables, dx_part_TW)
        return dx_TW, None, None, None, None, None


def _tables(cos_TR: Tensor, sin_TR: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For query, key and value."""
    turned, kept = (cos_TR, sin_TR), (cos_TR[:, :0], sin_TR[:, :0])
    return [turned, turned, kept]


def _rotate(x_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor, size: int) -> Tensor:
    """With J the turn by a quarter, (x J)[j] = ±x[j ± R/2]: x ∘ cos + (x J) ∘ sin = x ∘ cos + (x ∘ sin') J.

    A product with J is exact, and far cheaper than putting halves of 32 entries together.
    """
    # One pass over entries that lie far apart; what follows reads them side by side.
    out_HTD = x_TW.view(len(x_TW), -1, size).transpose(0, 1).clone(memory_format=torch.contiguous_format)
    if cos_TR.shape[1]:
        turn_DD = _quarter_turn(size, cos_TR.shape[1], x_TW.dtype)
        other_HTD = out_HTD * (_whole(sin_TR, size, 0.0) @ turn_DD.abs().t())
        out_HTD.mul_(_whole(cos_TR, size, 1.0)).view(-1, size).addmm_(other_HTD.view(-1, size), turn_DD)
    return out_HTD


def _rotate_back(d_out_HTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, dx_TW: Tensor) -> None:
    num_heads, _, size = d_out_HTD.shape
    d_HTD = d_out_HTD
    if cos_TR.shape[1]:
        turn_DD = _quarter_turn(size, cos_TR.shape[1], dx_TW.dtype)
        d_HTD = d_out_HTD * _whole(cos_TR, size, 1.0)
        other_HTD = d_out_HTD * _whole(sin_TR, size, 0.0)
        d_HTD.view(-1, size).addmm_(other_HTD.view(-1, size), turn_DD.t())
    dx_TW.unflatten(1, (num_heads, size)).copy_(d_HTD.transpose(0, 1))


def _whole(table_TR: Tensor, size: int, rest: float) -> Tensor:
    """The table with columns for the entries of a head that are not turned."""
    return torch.nn.functional.pad(table_TR, (0, size - table_TR.shape[1]), value=rest)


@functools.lru_cache(maxsize=8)
def _quarter_turn(size: int, num_turned: int, dtype: torch.dtype) -> Tensor:
    """J: x J holds the second half of the turned entries, negated, before the first."""
    half = num_turned // 2
    turn_DD = torch.zeros(size, size, dtype=dtype)
    places = torch.arange(half)
    turn_DD[places + half, places] = -1
    turn_DD[places, places + half] = 1
    return turn_DD


def rotated_heads(
    x: Tensor, tables: tuple[Tensor, Tensor], *, size: int, num_heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (1, H, T, D), key and value (1, K, T, D) of a projection (1, T, (H + 2 K) D), with positions.

    `tables` are cosine and sine, (1, T, R) with R <= D turned entries of a head.
    """
    cos_TR, sin_TR = (table[0].contiguous() for table in tables)
    x_TW = x.squeeze(0)  # the gradient of x[0] would be a copy among zeros
    q_HTD, k_KTD, v_KTD = _RotatedHeads.apply(x_TW, cos_TR, sin_TR, size, num_heads, kv_heads)  # type: ignore[no-untyped-call]
    return q_HTD[None], k_KTD[None], v_KTD[None]
