"""The kernels as functions of tensors, whose types and layouts in memory are asserted: C would read on.

Knows nothing of modules or of autograd.
# T tokens, W features of a token, H heads, D head size; S tiles of R rows and M keys, see heads.c
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phinetune.kernels.library import library


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels for tensors like `x`, or None where PyTorch has to do."""
    return _kernels(library(x.dtype)) if x.device.type == "cpu" else None


@functools.cache
def _kernels(found: ctypes.CDLL | None) -> Kernels | None:
    return None if found is None else Kernels(found)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels for one type of entries."""

    _library: ctypes.CDLL

    def _call(self, name: str, *arguments: Tensor | _Strided | float | None) -> None:
        function = getattr(self._library, name)
        if function.argtypes is None:
            function.restype = None
            function.argtypes = [*map(_type, arguments), ctypes.c_int]
        function(*map(_value, arguments), torch.get_num_threads())

    def norm(
        self, x: Tensor, branch: Tensor | None, weight_W: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x + branch (or x itself), the RMS norm of it, both (..., W), and 1 / root mean square of rows."""
        assert {x.dtype} == {tensor.dtype for tensor in (x, branch, weight_W) if tensor is not None}
        num_rows, width = x.numel() // len(weight_W), len(weight_W)
        both = x if branch is None else torch.empty_like(x)
        out, inverse_T = torch.empty_like(x), torch.empty(num_rows, dtype=torch.float32)
        self._call("norm", x, branch, weight_W, both, out, inverse_T, num_rows, width, float(epsilon))
        return both, out, inverse_T

    def norm_back(
        self, x: Tensor, weight_W: Tensor, inverse_T: Tensor, d_out: Tensor, d_past: Tensor | None
    ) -> Tensor:
        """The gradient of x by its norm and, where it is given, by the path past it."""
        dx = torch.empty_like(x)
        self._call("norm_back", x, weight_W, inverse_T, d_out, d_past, dx, len(inverse_T), len(weight_W))
        return dx

    def gate(self, gate_TW: Tensor, up_TW: Tensor) -> Tensor:
        """silu(gate) · up; rows of both may lie further apart than they are wide."""
        out_TW = torch.empty(gate_TW.shape, dtype=gate_TW.dtype)
        self._call(
            "gate", _Strided(gate_TW), _Strided(up_TW), out_TW, *gate_TW.shape, _common(gate_TW, up_TW)
        )
        return out_TW

    def gate_back(
        self, gate_TW: Tensor, up_TW: Tensor, d_out_TW: Tensor, d_gate_TW: Tensor, d_up_TW: Tensor
    ) -> None:
        """Write the gradients of gate and up to the last two."""
        sides = (gate_TW, up_TW, d_gate_TW, d_up_TW)
        gate, up, d_gate, d_up = map(_Strided, sides)
        self._call("gate_back", gate, up, d_out_TW, d_gate, d_up, *gate_TW.shape, _common(*sides))

    def rotate(self, x_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor, size: int) -> Tensor:
        """The heads of x apart, (H, T, D), the first R entries of each turned."""
        assert x_TW.dtype == cos_TR.dtype == sin_TR.dtype
        tokens, heads, turned = len(x_TW), x_TW.shape[1] // size, cos_TR.shape[1]
        out_HTD = torch.empty(heads, tokens, size, dtype=x_TW.dtype)
        self._call(
            "rotate", _Strided(x_TW), x_TW.stride(0), cos_TR, sin_TR, out_HTD, heads, tokens, size, turned
        )
        return out_HTD

    def rotate_back(self, d_out_HTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, dx_TW: Tensor) -> None:
        """Write the gradient of what `rotate` was given."""
        turned = cos_TR.shape[1]
        self._call(
            *("rotate_back", d_out_HTD, cos_TR, sin_TR, _Strided(dx_TW), dx_TW.stride(0)),
            *(*d_out_HTD.shape, turned),
        )

    def gather(self, x_HTD: Tensor, places: Places, out_SHRD: Tensor, scale: float = 1.0) -> None:
        """Copy stretches of tokens, scaled, each to its tile, and fill the tile up with zeros."""
        num_tiles, heads, num_rows, size = out_SHRD.shape
        strides = x_HTD.stride(0), x_HTD.stride(1)
        self._call(
            "gather",
            *(_Strided(x_HTD), *strides, places.starts_S, places.sizes_S),
            *(_Strided(out_SHRD), out_SHRD.stride(1), num_tiles, heads, num_rows, size, float(scale)),
        )

    def scatter(self, x_SHRD: Tensor, places: Places, out_HTD: Tensor, scale: float = 1.0) -> None:
        """Copy the tiles' rows, scaled, to their tokens, or add them to what is there."""
        num_tiles, heads, _, size = x_SHRD.shape
        strides = out_HTD.stride(0), out_HTD.stride(1)
        self._call(
            "scatter",
            *(_Strided(x_SHRD), x_SHRD.stride(1), places.starts_S, places.sizes_S, places.adds_S),
            *(_Strided(out_HTD), *strides, num_tiles, heads, size, float(scale)),
        )

    def softmax_(self, scores_SHRM: Tensor, spans_SR4: Tensor) -> Tensor:
        """In place: the softmax of each row over the two stretches of keys that it sees, zero elsewhere."""
        self._call("softmax", scores_SHRM, spans_SR4, *scores_SHRM.shape)
        return scores_SHRM

    def softmax_back_(self, d_SHRM: Tensor, probabilities_SHRM: Tensor, spans_SR4: Tensor) -> Tensor:
        """In place: the gradient of the scores by that of the probabilities."""
        self._call("softmax_back", d_SHRM, probabilities_SHRM, spans_SR4, *d_SHRM.shape)
        return d_SHRM

    def cross_entropy_(
        self, logits_NV: Tensor, targets_N: Tensor, smoothing: float, softcap: float
    ) -> Tensor:
        """The loss of each row in float32; the gradient of the logits takes their place."""
        greatest = targets_N.numpy().max(initial=0)
        if greatest >= logits_NV.shape[1]:
            raise IndexError(f"a target is {greatest}, of {logits_NV.shape[1]} entries")
        losses_N = torch.empty(len(logits_NV), dtype=torch.float32)
        self._call(
            "cross_entropy",
            logits_NV,
            targets_N,
            losses_N,
            *logits_NV.shape,
            float(smoothing),
            float(softcap),
        )
        return losses_N

    def draw_mask(self, num_words: int, threshold: int) -> Tensor:
        """Words of 64 bits, each set with probability 1 - threshold / 256, seeded by torch's generator.

        Bit i % 64 of word i // 64 does for entry i.
        """
        seed = int(torch.empty((), dtype=torch.int64).random_())
        mask = torch.empty(num_words, dtype=torch.int64)
        self._call("draw_mask", mask, num_words, seed, threshold)
        return mask

    def drop(self, x: Tensor, mask: Tensor, out: Tensor) -> Tensor:
        """Write x to `out`, which may be x, without the entries that the mask drops."""
        self._call("drop", x, mask, out, x.numel())
        return out


@dataclass(frozen=True, slots=True)
class Places:
    """Where in the batch the rows of S tiles are, and which of them add to the rows they are scattered to."""

    starts_S: Tensor
    sizes_S: Tensor
    adds_S: Tensor


@dataclass(frozen=True, slots=True)
class _Strided:
    """A tensor whose rows lie apart by a stride that the kernel is told; their entries do not."""

    tensor: Tensor


def _type(argument: Tensor | _Strided | float | None) -> type[Any]:
    if isinstance(argument, float):
        return ctypes.c_float
    return ctypes.c_int64 if isinstance(argument, int) else ctypes.c_void_p


def _value(argument: Tensor | _Strided | float | None) -> float | None:
    """An address for a tensor, none for None."""
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return argument.data_ptr()
    if isinstance(argument, _Strided):
        assert argument.tensor.stride(-1) == 1
        return argument.tensor.data_ptr()
    return argument


def _common(*x_TW: Tensor) -> int:
    """How far apart the rows of all of them lie, which are of one type."""
    ((stride, _),) = {(x.stride(0), x.dtype) for x in x_TW}
    return stride
