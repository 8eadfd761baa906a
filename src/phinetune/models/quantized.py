"""Frozen linear layers whose weight is kept in 8 or 4 bits.

    int8   whole numbers from -127 to 127, one scale for each 128 weights of a row
    nf4    the 16 levels of NormalFloat (arXiv 2305.14314), one scale for each 64 weights of a row

Codes and tables of nf4 are bitsandbytes'; int8 needs no library. Rows are filled up to whole blocks.
Codes follow from the weights alone: the same file gives the same codes on every run.
Knows nothing of files, adapters or training.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from phinetune.base.errors import SettingsError
from phinetune.lora.frozen import TiledLinear

Quantization = Literal["none", "int8", "nf4"]
BITS: dict[str, float] = {"int8": 8 + 16 / 128, "nf4": 4 + 32 / 64}
_INT8_BLOCK, _NF4_BLOCK = 128, 64
# A tile of 4 million weights stays in a processor's cache; a GPU wants larger products.
CPU_TILE_WEIGHTS, GPU_TILE_WEIGHTS = 1 << 22, 1 << 26
_ROWS_AT_ONCE = 256


class QuantizedLinear(TiledLinear):
    """A `TiledLinear` whose blocks run along the rows of its weight, (out, in)."""

    block: int

    @property
    def device(self) -> torch.device:
        return self._scale_OB.device

    @property
    def _scale_OB(self) -> Tensor:
        raise NotImplementedError

    def row_tiles(self) -> Iterator[slice]:
        return _slices(self.out_features, self._tile_weights // self.in_features, 64)

    def column_tiles(self) -> Iterator[slice]:
        return _slices(self.in_features, self._tile_weights // self.out_features, self.block)

    @property
    def _tile_weights(self) -> int:
        return CPU_TILE_WEIGHTS if self.device.type == "cpu" else GPU_TILE_WEIGHTS

    def _blocks(self, columns: slice) -> slice:
        """The blocks that hold these columns; tiles begin at the first column of a block."""
        return slice(columns.start // self.block, -(-columns.stop // self.block))


class Int8Linear(QuantizedLinear):
    """codes_OBI (out, blocks, 128) and scale_OB (out, blocks) in the type that the layer computes in."""

    block = _INT8_BLOCK

    def __init__(self, weight_OI: Tensor, *, dtype: torch.dtype, is_transposed: bool) -> None:
        super().__init__(weight_OI.shape[1], weight_OI.shape[0], dtype=dtype, is_transposed=is_transposed)
        parts = [_int8(_blocked(rows_OI, self.block)) for rows_OI in weight_OI.split(_ROWS_AT_ONCE)]
        self.register_buffer("codes_OBI", torch.cat([codes for codes, _ in parts]))
        self.register_buffer("scale_OB", torch.cat([scale for _, scale in parts]).to(dtype))

    codes_OBI: Tensor
    scale_OB: Tensor

    @property
    def _scale_OB(self) -> Tensor:
        return self.scale_OB

    def tile(self, rows: slice, columns: slice) -> Tensor:
        blocks = self._blocks(columns)
        weight_OBI = self.codes_OBI[rows, blocks].to(self.dtype).mul_(self.scale_OB[rows, blocks, None])
        return weight_OBI.flatten(1)[:, : columns.stop - columns.start]


class Nf4Linear(QuantizedLinear):
    """codes_OI (out, bytes), two to the byte, and largest_OB (out, blocks), the largest weight of each."""

    block = _NF4_BLOCK

    def __init__(self, weight_OI: Tensor, *, dtype: torch.dtype, is_transposed: bool) -> None:
        super().__init__(weight_OI.shape[1], weight_OI.shape[0], dtype=dtype, is_transposed=is_transposed)
        parts = [_nf4(_blocked(rows_OI, self.block)) for rows_OI in weight_OI.split(_ROWS_AT_ONCE)]
        self.register_buffer("codes_OI", torch.cat([codes for codes, _ in parts]))
        self.register_buffer("largest_OB", torch.cat([largest for _, largest in parts]))

    codes_OI: Tensor
    largest_OB: Tensor

    @property
    def _scale_OB(self) -> Tensor:
        return self.largest_OB

    def tile(self, rows: slice, columns: slice) -> Tensor:
        blocks = self._blocks(columns)
        half = self.block // 2
        # The operator reads memory as it lies, whatever the strides say.
        codes_OI = self.codes_OI[rows, blocks.start * half : blocks.stop * half].contiguous()
        largest_OB = self.largest_OB[rows, blocks].contiguous()
        shape = [len(codes_OI), codes_OI.shape[1] * 2]
        _bitsandbytes()  # registers the operator
        weight_OI: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes_OI.view(-1, 1), largest_OB.view(-1), self.block, "nf4", shape, self.dtype
        )
        return weight_OI[:, : columns.stop - columns.start]


def quantized(
    weight: Tensor,
    bias_O: Tensor | None,
    kind: str,
    *,
    dtype: torch.dtype,
    is_transposed: bool = False,
) -> QuantizedLinear:
    """A layer with the weight in the codes of `kind` and nothing else of it, on the weight's device.

    `weight` has the form of its file: (out, in), or (in, out) with `is_transposed`. It is read a few rows
    at a time. Raises `SettingsError` when nf4's library is missing.

    >>> layer = quantized(torch.eye(4), None, "int8", dtype=torch.float32)
    >>> layer(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    weight_OI = weight.t() if is_transposed else weight
    made = Int8Linear if kind == "int8" else Nf4Linear
    with torch.no_grad():
        layer = made(weight_OI, dtype=dtype, is_transposed=is_transposed)
    layer.register_buffer("bias", None if bias_O is None else bias_O.to(dtype))
    return layer


def require_quantizer(kind: str) -> None:
    """Raise `SettingsError` when bases cannot be quantised in this way here."""
    if kind == "nf4":
        _bitsandbytes()


def num_original_weights(model: nn.Module) -> int:
    """The weights that stand for the original's, however they are kept."""
    kept = sum(parameter.numel() for parameter in model.parameters())
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            kept += layer.in_features * layer.out_features
            kept += layer.bias.numel() if layer.bias is not None else 0
    return kept


def _slices(length: int, most: int, multiple: int) -> Iterator[slice]:
    size = max(multiple, most // multiple * multiple)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _blocked(rows_OI: Tensor, block: int) -> Tensor:
    """A few rows as (rows, blocks, block) in float32, filled up with zeros."""
    missing = -rows_OI.shape[1] % block
    filled_OI = torch.nn.functional.pad(rows_OI.float(), (0, missing))
    return filled_OI.reshape(len(rows_OI), -1, block)


def _int8(weight_OBI: Tensor) -> tuple[Tensor, Tensor]:
    scale_OB = weight_OBI.abs().amax(-1) / 127
    steps_OB = torch.where(scale_OB > 0, scale_OB, 1.0)
    return torch.round(weight_OBI / steps_OB[..., None]).to(torch.int8), scale_OB


def _nf4(weight_OBI: Tensor) -> tuple[Tensor, Tensor]:
    functional = _bitsandbytes().functional
    codes, state = functional.quantize_4bit(
        weight_OBI.contiguous(), blocksize=weight_OBI.shape[-1], quant_type="nf4"
    )
    return codes.view(len(weight_OBI), -1), state.absmax.view(weight_OBI.shape[:2])


@cache
def _bitsandbytes() -> ModuleType:
    # On import it would fetch a kernel from a hub where `kernels` is installed, and complain where not.
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, known = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes
    except ImportError as error:
        raise SettingsError(
            "quantize: nf4 needs bitsandbytes, which is not installed",
            where="quantize",
            why=str(error),
            do='install it: pip install "phinetune[quantize]"; or write quantize: int8, which needs nothing',
        ) from None
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if known is not None:
            sys.modules["kernels"] = known
    module: ModuleType = bitsandbytes
    return module
