"""Compile the kernels for this machine, once, and load them.

The library lies in the user's cache under a name that tells source, flags, compiler and processor, so that
a change of any of them makes a new one. It shares PyTorch's threads: `libgomp` is loaded already, by the
same name.
Knows nothing of what the kernels compute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from phinetune.base.errors import SpaceError
from phinetune.base.files import committed_file

_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = (
    "-std=c11",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)
# Half of what such a processor offers is gcc's own choice there.
_X86_FLAGS = ("-mprefer-vector-width=512",)
_TYPES = {torch.bfloat16: ("-DBFLOAT16",), torch.float32: ()}
_COMPILE_TIMEOUT_S = 60


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for tensors of a type; None for other types, without a compiler, and where one fails.

    The first call on a machine takes a second.
    """
    return _loaded(dtype)[0]


def described(dtype: torch.dtype) -> str:
    """Whether there are kernels for a type, in words, and else what would bring them."""
    return _loaded(dtype)[1]


@functools.cache
def _loaded(dtype: torch.dtype) -> tuple[ctypes.CDLL | None, str]:
    if dtype not in _TYPES:
        return None, "no kernels for this type"
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None, f"no C compiler ({', '.join(_COMPILERS)}): with one training is faster"
    try:
        found = ctypes.CDLL(str(_compiled(compiler, _TYPES[dtype])))
        tiles = " and products in tile registers" if found.can_multiply() else ""
        return found, f"kernels in C{tiles}, compiled by {compiler}"
    except subprocess.CalledProcessError as error:
        told = [line for line in error.stderr.decode(errors="replace").splitlines() if line.strip()]
        why = next(
            (line for line in told if "error" in line), told[0] if told else f"exit {error.returncode}"
        )
    except (OSError, RuntimeError, SpaceError, subprocess.TimeoutExpired) as error:
        why = str(error)
    return None, f"no kernels, for {compiler} failed: {why.strip()}"


def _compiled(compiler: str, of_type: tuple[str, ...]) -> Path:
    folder = Path(__file__).parent
    flags = (*_FLAGS, *(_X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ()), *of_type)
    told = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S
    ).stdout
    known = [told, " ".join(flags).encode(), _processor()]
    known += [path.read_bytes() for path in sorted(folder.glob("*.[ch]"))]
    name = hashlib.sha256(b"\0".join(known)).hexdigest()[:16]
    found = Path.home() / ".cache" / "phinetune" / "kernels" / f"{name}.so"
    if not found.exists():
        found.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with committed_file(found) as out:
            sources = [str(path) for path in sorted(folder.glob("*.c"))]
            command = [compiler, *flags, *sources, "-o", str(out), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S)
    return found


def _processor() -> bytes:
    """What tells one processor from another: a library for one may not run on the other."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(
        sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features"))})
    )
