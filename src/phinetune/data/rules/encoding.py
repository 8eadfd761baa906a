"""Text that was decoded with the wrong table once: UTF-8 read as Windows-1252 or Latin-1 (mojibake)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from phinetune.data.findings import Finding
from phinetune.data.rules.base import RowCheck, RowView, Rule

MOJIBAKE = Rule(
    id="mojibake",
    severity="warning",
    meaning="letters like Ã© or â€™ are what is left of é and ’; the model learns to write them",
    fix="repair it: phinetune data clean; or read the source again as UTF-8",
    can_clean="the letters are put right",
)

_CONTINUATION = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
# What bytes of UTF-8 look like in Windows-1252: a first byte of two to four, and those that go on.
_BROKEN = re.compile(
    f"(?:[\xc2-\xdf][{_CONTINUATION}]|[\xe0-\xef][{_CONTINUATION}]{{2}}|[\xf0-\xf4][{_CONTINUATION}]{{3}})+"
)
# Of the two-byte forms these first letters alone are rare enough in sound text to judge by one pair.
_TELLING = re.compile(f"[\xc2\xc3][{_CONTINUATION}]|[\xe0-\xf4]")
_SOUND_AFTER = frozenset("«»“”‘’–—…")


def repaired(text: str) -> str:
    """The text with every damaged place put right; sound text as it is.

    >>> repaired("CafÃ©, itâ€™s «CAFÉ»")
    'Café, it’s «CAFÉ»'
    """
    if text.isascii():
        return text
    for _ in range(3):  # damage may have happened more than once
        mended = _BROKEN.sub(_mended, text)
        if mended == text:
            break
        text = mended
    return text


def _mended(found: re.Match[str]) -> str:
    broken = found.group()
    if len(broken) == 2 and (not _TELLING.match(broken) or (broken[1] in _SOUND_AFTER and broken[0] != "Ã")):
        return broken
    try:
        text = b"".join(_byte(char) for char in broken).decode("utf-8")
    except UnicodeDecodeError:
        return broken
    return text if all(char.isprintable() or char.isspace() for char in text) else broken


def _byte(char: str) -> bytes:
    try:
        return char.encode("cp1252")
    except UnicodeEncodeError:
        return char.encode("latin-1")


class EncodingCheck(RowCheck):
    """Mojibake in any turn."""

    def see(self, row: RowView) -> Iterator[Finding]:
        for field, _, text in row.parts:
            if text.isascii() or (mended := repaired(text)) == text:
                continue
            place = next(
                index
                for index, pair in enumerate(zip(text, mended + " ", strict=False))
                if pair[0] != pair[1]
            )
            message = "letters were decoded with the wrong table (mojibake)"
            yield MOJIBAKE.finding(row.source, message, field=field, seen=text, around=place)
