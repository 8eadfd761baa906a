"""Look at this machine: cores, memory, devices, precision, package versions, disk, network, demo base.

Changes nothing and opens no connection except one look-up of the hub's name.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Distribution, the extra that brings it ("" when phinetune cannot do without), and what it is for.
PACKAGES = (
    ("torch", "", "tensors"),
    ("transformers", "", "model definitions"),
    ("tokenizers", "", "text to tokens"),
    ("safetensors", "", "weight files"),
    ("huggingface_hub", "", "fetching models by name"),
    ("numpy", "", "statistics"),
    ("pydantic", "", "settings"),
    ("ruamel.yaml", "", "lora.yaml"),
    ("matplotlib", "", "plots"),
    ("bitsandbytes", "quantize", "bases in 4 bits: quantize: nf4"),
    ("peft", "bench", "only to compare with"),
    ("trl", "bench", "only to compare with"),
)
LOW_MEMORY_BYTES = 3e9
LOW_DISK_BYTES = 2e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One distribution; `version` is "" when it is not installed."""

    name: str
    version: str
    extra: str
    remark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Something that is not there, whether training needs it, and how to get it."""

    what: str
    do: str
    is_needed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Everything `doctor` shows. Sizes are in bytes."""

    system: str
    python: str
    cpu: str
    num_cores: int
    memory_bytes: int
    free_memory_bytes: int
    devices: tuple[str, ...]
    device: str
    dtype: str
    dtype_reason: str
    free_disk_bytes: int
    disk_path: str
    network: str
    demo_base: str
    packages: tuple[Package, ...]
    missing: tuple[Missing, ...]

    @property
    def is_ready(self) -> bool:
        """Whether nothing that training needs is missing."""
        return not any(missing.is_needed for missing in self.missing)

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Name and value of each line to show."""
        gib = 1 << 30
        return (
            ("system", f"{self.system}, Python {self.python}"),
            ("processor", f"{self.cpu}, {self.num_cores} cores"),
            ("memory", f"{self.memory_bytes / gib:.1f} GiB, {self.free_memory_bytes / gib:.1f} GiB free"),
            ("devices", ", ".join(self.devices)),
            ("training on", f"{self.device}, {self.dtype_reason}" if self.device else "nothing: see below"),
            ("disk", f"{self.free_disk_bytes / gib:.1f} GiB free for {self.disk_path}"),
            ("network", self.network),
            ("demo base", self.demo_base),
        )

    def record(self) -> dict[str, Any]:
        """The same as plain values."""
        return {**asdict(self), "is_ready": self.is_ready}


def inspect_machine() -> Machine:
    """Look, once. Takes a second or two: the precision probe multiplies matrices."""
    import psutil

    packages = tuple(_package(*entry) for entry in PACKAGES)
    memory = psutil.virtual_memory()
    devices, device, dtype, reason = _compute(packages)
    disk = Path.cwd()
    free_disk = shutil.disk_usage(disk).free
    demo = _demo_base(packages)
    return Machine(
        system=f"{platform.system()} {platform.release()}".strip(),
        python=platform.python_version(),
        cpu=_cpu_name(),
        num_cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        devices=devices,
        device=device,
        dtype=dtype,
        dtype_reason=reason,
        free_disk_bytes=free_disk,
        disk_path=str(disk),
        network=_network(),
        demo_base=demo or "ready",
        packages=packages,
        missing=_missing(packages, memory.available, free_disk, demo),
    )


def _package(name: str, extra: str, purpose: str) -> Package:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = ""
    return Package(name=name, version=version, extra=extra, remark=purpose)


def _compute(packages: tuple[Package, ...]) -> tuple[tuple[str, ...], str, str, str]:
    """Devices that are there, and the choice between them with its reason."""
    if not next(package for package in packages if package.name == "torch").version:
        return ("unknown without torch",), "", "", ""
    import torch

    from phinetune.models.device import choose

    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} {properties.name} {properties.total_memory / (1 << 30):.0f} GiB")
    if torch.backends.mps.is_available():
        devices.append("mps")
    chosen = choose()
    return tuple(devices), str(chosen.device), chosen.dtype_name, chosen.reason


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _network() -> str:
    import socket

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "not used: HF_HUB_OFFLINE is set"
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        return "huggingface.co is not reachable: models by name only if already fetched; demo needs none"
    return "huggingface.co is known here: models can be fetched by name"


def _demo_base(packages: tuple[Package, ...]) -> str:
    """Why the bundled base cannot be used, or ""."""
    if any(not package.version for package in packages if not package.extra):
        return "not looked at: packages are missing"
    from phinetune.base.errors import ModelError
    from phinetune.models.catalog import find_model

    try:
        find_model("demo")
    except ModelError as error:
        return f"{error.what}: {error.why}"
    return ""


def _missing(
    packages: tuple[Package, ...], free_memory_bytes: int, free_disk_bytes: int, demo: str
) -> tuple[Missing, ...]:
    found = [
        Missing(what=package.name, do=f"{_pip()} install {package.name}", is_needed=True)
        for package in packages
        if not package.version and not package.extra
    ]
    if demo:
        found.append(
            Missing(
                what=f"the demo base ({demo})",
                do="install phinetune again, or train with --model and another model",
                is_needed=False,
            )
        )
    if free_memory_bytes < LOW_MEMORY_BYTES:
        found.append(
            Missing(
                what=f"memory: only {free_memory_bytes / 1e9:.1f} GB are free",
                do="close other programs; the demo base needs about 1 GB, a model of 4 billion weights "
                "12 GB, or 6 GB with quantize: nf4",
                is_needed=False,
            )
        )
    if free_disk_bytes < LOW_DISK_BYTES:
        found.append(
            Missing(
                what=f"disk space: only {free_disk_bytes / 1e9:.1f} GB are free",
                do="free some space before fetching a model",
                is_needed=False,
            )
        )
    return tuple(found)


def _pip() -> str:
    return f"{Path(sys.executable).name} -m pip"
