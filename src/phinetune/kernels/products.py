"""Matrix products of bfloat16 in a CPU's tile registers (Intel AMX), else by PyTorch.

A right factor lies as it is: a weight (out, in) is given as its transpose, which is a view. An adapter's
update is added to the same sums, before they are rounded. PyTorch's own products prepare code for every new
number of rows, and leave threads idle for many of them. Knows nothing of layers or of autograd.

# M rows, N columns, L entries of a sum, R rank
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from phinetune.kernels.library import library

# With fewer rows PyTorch is faster, up to twice: laying a weight out then takes longer than the product.
LEAST_ROWS = 128
# Where rows of a mask have to begin.
MASK_MULTIPLE = 32


class _Product(ctypes.Structure):
    """What `multiply` in products.c takes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "right", "update_left", "update_right", "bias")),
        *((name, ctypes.c_void_p) for name in ("left_mask", "right_mask", "update_mask", "out")),
        *(
            (f"{name}_stride", ctypes.c_int64)
            for name in ("left", "right", "update_left", "update_right", "out")
        ),
        *((name, ctypes.c_int64) for name in ("right_is_upright", "update_right_is_upright", "out_is_float")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_columns", "depth", "rank")),
        ("scale", ctypes.c_float),
    )


def product_of(left_ML: Tensor, right_LN: Tensor, *, out: Tensor | None = None) -> Tensor:
    """left · right, in tiles where that can be. Not for autograd."""
    if products := products_for(left_ML, right_LN):
        return products.multiply(left_ML, right_LN, out=out)
    return torch.matmul(left_ML, right_LN, out=out)


def products_for(left_ML: Tensor, right_LN: Tensor) -> Products | None:
    """Products in tiles, where this machine has them and they are faster for such factors."""
    if left_ML.dtype != right_LN.dtype or len(left_ML) < LEAST_ROWS:
        return None
    if left_ML.stride(1) != 1 or 1 not in right_LN.stride():
        return None
    found = tile_library(left_ML.dtype, left_ML.device)
    return None if found is None else Products(found)


def has_tiles(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of many rows, and attention, are computed in tiles here."""
    return tile_library(dtype, device) is not None


def tile_library(dtype: torch.dtype, device: torch.device) -> ctypes.CDLL | None:
    """The kernels that work in tiles, where there are any for this type and device."""
    is_fit = dtype == torch.bfloat16 and device.type == "cpu"
    return _with_tiles(library(dtype)) if is_fit else None


@functools.cache
def _with_tiles(found: ctypes.CDLL | None) -> ctypes.CDLL | None:
    if found is None or not found.can_multiply():
        return None
    found.multiply.restype = found.attend.restype = None
    found.scratch_bytes.restype = found.attention_bytes.restype = ctypes.c_int64
    return found


@dataclass(frozen=True, slots=True)
class Products:
    """Products in tiles."""

    _library: ctypes.CDLL

    def multiply(
        self,
        left_ML: Tensor,
        right_LN: Tensor,
        *,
        update: tuple[Tensor, Tensor] | None = None,
        left_mask: Tensor | None = None,
        right_mask: Tensor | None = None,
        update_mask: Tensor | None = None,
        bias_N: Tensor | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """scale · (left · right + update_MR · update_RN) + bias, in `out` or else in a new bfloat16 tensor.

        A mask of one bit an entry (`Kernels.draw_mask`) drops entries of left, of right, or of the update's
        product; such rows have a multiple of 32 entries, and a right factor lies row by row.
        """
        (num_rows, depth), num_columns = left_ML.shape, right_LN.shape[1]
        out = left_ML.new_empty(num_rows, num_columns) if out is None else out
        update_MR, update_RN = update or (None, None)
        rank = 0 if update_MR is None else update_MR.shape[1]
        assert len(right_LN) == depth
        assert out.shape == (num_rows, num_columns)
        assert update_RN is None or update_RN.shape == (rank, num_columns)
        assert left_mask is None or depth % MASK_MULTIPLE == 0
        assert (right_mask is None and update_mask is None) or num_columns % MASK_MULTIPLE == 0
        assert right_mask is None or right_LN.stride(1) == 1
        for tensor in (left_ML, right_LN, update_MR, update_RN, bias_N):
            assert tensor is None or tensor.dtype == torch.bfloat16
        product = _Product(
            left_mask=_address(left_mask),
            right_mask=_address(right_mask),
            update_mask=_address(update_mask),
            bias=_address(bias_N),
            out_is_float=out.dtype == torch.float32,
            num_rows=num_rows,
            num_columns=num_columns,
            depth=depth,
            rank=rank,
            scale=scale,
        )
        for name, rows in (("left", left_ML), ("update_left", update_MR), ("out", out)):
            if rows is not None:
                assert rows.stride(1) == 1 or rows.shape[1] == 1
                setattr(product, name, rows.data_ptr())
                setattr(product, f"{name}_stride", rows.stride(0))
        for name, right in (("right", right_LN), ("update_right", update_RN)):
            if right is not None:
                is_upright = right.stride(1) == 1
                assert is_upright or right.stride(0) == 1
                setattr(product, name, right.data_ptr())
                setattr(product, f"{name}_stride", right.stride(0 if is_upright else 1))
                setattr(product, f"{name}_is_upright", is_upright)
        num_threads = torch.get_num_threads()
        scratch = SCRATCH.of(self._library.scratch_bytes(ctypes.byref(product), num_threads))
        self._library.multiply(ctypes.byref(product), ctypes.c_void_p(scratch), num_threads)
        return out


class _Scratch(threading.local):
    """Memory that a thread's products work in, kept from one to the next."""

    def __init__(self) -> None:
        self.kept = torch.empty(0, dtype=torch.uint8)

    def of(self, size_bytes: int) -> int:
        """The address of so many bytes."""
        if len(self.kept) < size_bytes:
            self.kept = torch.empty(size_bytes, dtype=torch.uint8)
        return self.kept.data_ptr()


SCRATCH = _Scratch()


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
