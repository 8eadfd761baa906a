"""PyTorch's `.pt` archives of plain tensors, read and written without ever running what is in them.

Such a file is a zip of raw storages beside a small program for Python's pickle machine. That program
is not given to Python: its opcodes are walked here, by a walker that can build dicts, lists and tensors
and nothing else. It has no way to import or call; any other name in the program ends the reading.
Knows nothing of adapters.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phinetune.base.errors import AdapterError
from phinetune.base.files import write_atomically

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}
_STORAGE_OF = {kind: name for name, kind in _STORAGES.items()}
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_ORDERED = "collections OrderedDict"
_NAMES = {_TENSOR, _PARAMETER, _ORDERED, *(f"torch {name}" for name in _STORAGES)}
_MARK = object()


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that the program mentions; only ever compared, never looked up."""

    text: str


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: torch.dtype
    data: bytes


def read_torch_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt` file by name; `AdapterError` for anything but a plain dict of tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise _refused(path, "its records are compressed, which PyTorch never does")
            content = _Walker(archive, path).walk()
    except zipfile.BadZipFile:
        raise _refused(
            path, "it is not a whole archive; files older than PyTorch 1.6 are bare pickles"
        ) from None
    except (
        EOFError,
        KeyError,
        IndexError,
        MemoryError,
        OSError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
        struct.error,
    ) as error:
        raise _refused(path, f"its content is damaged ({type(error).__name__})") from None
    for wrapper in ("model_state_dict", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise _refused(path, "it does not hold a dict of tensors")
    return {str(name): tensor for name, tensor in content.items()}


def write_torch_archive(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a `.pt` file that `torch.load(path, weights_only=True)` opens."""
    program = bytearray(b"\x80\x02}(")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, (name, tensor) in enumerate(tensors.items()):
            whole = tensor.detach().contiguous().cpu()
            program += _text(name) + _rebuild(whole, str(number))
            archive.writestr(f"archive/data/{number}", whole.view(-1).view(torch.uint8).numpy().tobytes())
        archive.writestr("archive/data.pkl", bytes(program + b"u."))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    write_atomically(path, buffer.getvalue())


def _rebuild(tensor: Tensor, key: str) -> bytes:
    """The opcodes that rebuild one tensor from the storage `key`."""
    kind = _STORAGE_OF[tensor.dtype]
    storage = b"(" + _text("storage") + _global(f"torch {kind}") + _text(key) + _text("cpu")
    storage += _integer(tensor.numel()) + b"tQ"
    layout = _integer(0) + _integers(tensor.shape) + _integers(tensor.stride())
    return _global(_TENSOR) + b"(" + storage + layout + b"\x89" + _global(_ORDERED) + b")RtR"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _integer(value: int) -> bytes:
    data = value.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + data


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def _refused(path: Path, why: str) -> AdapterError:
    target = path.with_suffix(".safetensors").name
    return AdapterError(
        "this PyTorch file cannot be read safely",
        where=str(path),
        why=why,
        do='if you trust it, convert it with: python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{path.name}', weights_only=True), '{target}')\"",
    )


class _Walker:
    """Walks the opcodes of one program; an opcode or name it does not know ends the reading."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive, self.path = archive, path
        programs = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise _refused(path, "it has no data.pkl: not a file of torch.save")
        self.root = programs[0].removesuffix("data.pkl")
        order = f"{self.root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise _refused(path, "it was written on a big-endian machine")
        # Tensors may be views of one storage, but not so many that a small file fills the memory.
        self.bytes_left = 4 * path.stat().st_size
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def walk(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self.archive.read(f"{self.root}data.pkl")):
            self._step(opcode.name, argument)
        (content,) = self.stack
        return content

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if name == "APPEND" else self._since_mark()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self._name(argument))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._name(f"{module} {attribute}"))
            case "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._built(function, arguments))
            case "BUILD":
                stack.pop()  # torch's notes on a state dict; they hold no tensors
                if not isinstance(stack[-1], dict):
                    raise _refused(self.path, "it sets the state of an object")
            case _:
                raise _refused(self.path, f"its program uses the opcode {name}")

    def _since_mark(self) -> list[Any]:
        start = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def _name(self, text: str) -> _Name:
        if text not in _NAMES:
            raise _refused(self.path, f"its program asks Python for '{text.replace(' ', '.')}'")
        return _Name(text)

    def _storage(self, word: str, kind: _Name, key: str, _device: str, num_entries: int) -> _Storage:
        storage = _Storage(_STORAGES[kind.text.split(" ")[1]], self.archive.read(f"{self.root}data/{key}"))
        if word != "storage" or len(storage.data) != num_entries * storage.kind.itemsize:
            raise ValueError("a storage of another size")
        return storage

    def _built(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        match function:
            case _Name(text) if text == _ORDERED:
                return dict(*arguments)
            case _Name(text) if text == _PARAMETER:
                return arguments[0]
            case _Name(text) if text == _TENSOR:
                storage, offset, size, stride = arguments[:4]
                if not isinstance(storage, _Storage) or min((*size, *stride, offset), default=0) < 0:
                    raise ValueError("a tensor without a storage")
                if math.prod(size) * storage.kind.itemsize > len(storage.data):
                    raise ValueError("a tensor larger than its storage")
                self.bytes_left -= math.prod(size) * storage.kind.itemsize
                if self.bytes_left < 0:
                    raise _refused(self.path, "its tensors are many times as large as the file")
                if not math.prod(size):
                    return torch.empty(size, dtype=storage.kind)
                flat = torch.frombuffer(bytearray(storage.data), dtype=storage.kind)
                return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)
        raise _refused(self.path, "its program calls what it must not")
