"""The bytes of a data file, unpacked where it is compressed; and its text in pieces, whatever its encoding.

Compression is recognised by the first bytes, never by the name. Knows nothing of rows.
"""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from phinetune.base.errors import DataError

CHUNK_BYTES = 1 << 20
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
# What reading a damaged or cut archive raises.
DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)

# Longest first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


def compression_of(path: Path) -> str:
    """gzip, xz, zstd or ""."""
    with path.open("rb") as file:
        head = file.read(8)
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "")


def open_bytes(path: Path) -> BinaryIO:
    """The unpacked bytes of a file, to be read once from the start.

    Raises `OSError`, and `DataError` for zstd where nothing can unpack it. Damage shows while reading.
    """
    kind = compression_of(path)
    if kind == "gzip":
        return cast("BinaryIO", gzip.open(path, "rb"))
    if kind == "xz":
        return cast("BinaryIO", lzma.open(path, "rb"))
    return _open_zstd(path) if kind == "zstd" else path.open("rb")


def _open_zstd(path: Path) -> BinaryIO:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14
    except ImportError:
        pass
    else:
        return cast("BinaryIO", zstd.open(path, "rb"))
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            "a .zst file needs pyarrow to be read",
            where=str(path),
            do="pip install 'phinetune[data]', or unpack it first: zstd -d",
        ) from None
    return cast(
        "BinaryIO", io.BufferedReader(_ArrowStream(pyarrow.input_stream(str(path), compression="zstd")))
    )


class _ArrowStream(io.RawIOBase):
    """pyarrow's stream in the form that Python's buffer wants."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._stream.read(len(buffer))
        except OSError as error:  # pyarrow's word for damage
            raise EOFError(str(error)) from None
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._stream.close()
        super().close()


def encoding_of(head: bytes) -> tuple[str, int]:
    """The encoding that the first bytes tell, and the length of the byte order mark.

    >>> encoding_of(b"\\xff\\xfeh\\x00")
    ('utf-16-le', 2)
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    # Latin text in UTF-16 has a zero byte beside every letter; UTF-8 text has none.
    if head.count(0) * 4 > len(head):
        is_wide = head.count(0) * 8 > len(head) * 5
        size = 4 if is_wide else 2
        is_little = head[: size * 64 : size].count(0) < head[size - 1 : size * 64 : size].count(0)
        return f"utf-{size * 8}-{'le' if is_little else 'be'}", 0
    return "utf-8", 0


def text_chunks(stream: BinaryIO) -> Iterator[tuple[str, bool]]:
    """Pieces of text of about a MiB, and whether a piece held bytes that are not of its encoding."""
    head = stream.read(4096)
    encoding, mark = encoding_of(head)
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    block = head[mark:] + stream.read(CHUNK_BYTES)
    while block:
        following = stream.read(CHUNK_BYTES)
        try:
            yield decoder.decode(block, final=not following), False
        except UnicodeDecodeError:
            decoder = codecs.getincrementaldecoder(encoding)("strict")
            yield block.decode(encoding, errors="replace"), True
        block = following
