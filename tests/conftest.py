"""What every test stands on: no network, no telemetry, the same random numbers on every run."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Set before any test imports a library that reads them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    NO_COLOR="1",
    OMP_NUM_THREADS="1",  # tiny models: more threads only wait for each other
    TOKENIZERS_PARALLELISM="false",
)

# What several folders of tests build on.
sys.path.insert(0, str(Path(__file__).parent / "shared"))

settings.register_profile(
    "phinetune", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("phinetune")

_connect = socket.socket.connect


def _loopback_only(self: socket.socket, address: Any) -> None:
    is_loopback = not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")
    if not is_loopback:
        raise OSError(f"a test tried to reach {address}: tests use no network")
    _connect(self, address)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _loopback_only)


@pytest.fixture(params=["tiles", "kernels", "torch"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the kernels in C and products in tile registers; without the latter; and with what
    does the work of both without a compiler."""
    import torch

    from phinetune.kernels import calls, products

    if request.param == "tiles" and not products.has_tiles(torch.bfloat16, torch.device("cpu")):
        pytest.skip("the processor has no tile registers (AMX), or there is no C compiler")
    if request.param == "kernels" and calls.library(torch.float32) is None:
        pytest.skip("no C compiler to make the kernels with")
    for module in {"tiles": [], "kernels": [products], "torch": [calls, products]}[request.param]:
        monkeypatch.setattr(module, "library", lambda dtype: None)
    monkeypatch.setattr(products, "LEAST_ROWS", 10)  # tests have few
    return str(request.param)
