"""The machine and the versions that a figure was measured with, recorded and told; imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The processor by its own name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(threads: int) -> dict[str, Any]:
    """As `machine` in every report; 0 threads stand for PyTorch's own choice."""
    return {
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        "threads": threads or "default",
        # Windows has none.
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def measured_on(report: Mapping[str, Any]) -> str:
    """One line of what a script's report recorded: the machine, how much of it was used, the versions."""
    found = report["machine"]
    parts = [str(report.get("gpu") or found["cpu"]), f"{found['num_cpus']} CPUs"]
    parts.append("1 thread" if found["threads"] == 1 else f"threads: {found['threads']}")
    if found["load_average"]:
        parts.append(f"load {found['load_average'][0]:.1f}")
    packages = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    return f"{', '.join(parts)}; {packages}"
