"""Matrix products in tile registers against PyTorch's, there and back, for rows as chats have them.

    python benchmarks/products_cpu.py [--threads N] [--hidden 768] [--inner 2048]

*first* is PyTorch's first product of a size, for which it prepares code; *again* and *tiles* are medians by
turns. Each size is that of a layer of a block with the form of Phi-3. Needs a processor with AMX.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from phinetune.kernels.products import LEAST_ROWS, Products, products_for

ROWS = (LEAST_ROWS, 333, 751, 1083, 1450, 2137)
NUM_TURNS = 9


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def compared(name: str, left_ML: Tensor, right_LN: Tensor, products: Products) -> None:
    first = milliseconds(lambda: left_ML @ right_LN)
    turns = [
        (
            milliseconds(lambda: left_ML @ right_LN),
            milliseconds(lambda: products.multiply(left_ML, right_LN)),
        )
        for _ in range(NUM_TURNS)
    ]
    again, tiles = (statistics.median(side) for side in zip(*turns, strict=True))
    (rows, depth), columns = left_ML.shape, right_LN.shape[1]
    speed = 2e-9 * rows * depth * columns / tiles
    print(
        f"{rows:>6} {name:<24}{first:>8.2f}{again:>8.2f}{tiles:>8.2f}{again / tiles:>13.2f}{speed:>10.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="products in tile registers against PyTorch's")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--inner", type=int, default=2048)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    hidden, inner = options.hidden, options.inner
    layers = {
        "qkv": (hidden, 3 * hidden),
        "o": (hidden, hidden),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bfloat16, milliseconds")
    print(f"{'rows':>6} {'layer':<24}{'first':>8}{'again':>8}{'tiles':>8}{'again/tiles':>13}{'TFLOP/s':>10}")
    for rows in ROWS:
        for name, (num_inputs, num_outputs) in layers.items():
            weight_OI = torch.randn(num_outputs, num_inputs).bfloat16()
            x_TI, dy_TO = (torch.randn(rows, size).bfloat16() for size in (num_inputs, num_outputs))
            products = products_for(x_TI, weight_OI.t())
            if products is None:
                sys.exit("this processor has no tile registers (AMX), or there is no C compiler")
            compared(f"{name} forward", x_TI, weight_OI.t(), products)
            compared(f"{name} backward", dy_TO, weight_OI, products)


if __name__ == "__main__":
    main()
