"""What is wrong with a row, where, and how to put it right; and how many such findings look as one error.

Knows nothing of files, JSON or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from phinetune.base.errors import DataError

# An error stops training, a warning is likely to harm it, a note is worth knowing.
Severity = Literal["error", "warning", "note"]

EXCERPT_CHARS = 60
NUM_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault. `line` is 1-based, 0 for the file as a whole; `excerpt` holds no control characters."""

    rule: str
    severity: Severity
    file: str
    line: int
    message: str
    fix: str
    field: str = ""
    excerpt: str = ""

    @property
    def where(self) -> str:
        """File, line and field, as far as they are known.

        >>> Finding(rule="role", severity="error", file="train.json", line=37, field="messages[1].role",
        ...         message="", fix="").where
        'train.json:37 messages[1].role'
        """
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place} {self.field}".rstrip()

    @property
    def is_error(self) -> bool:
        return self.severity == "error"


def excerpt(text: str, around: int = 0) -> str:
    r"""At most 60 characters of `text` near position `around`, with everything unprintable escaped.

    >>> excerpt("a\tb\u202e")
    'a\\tb\\u202e'
    """
    begin = max(0, around - EXCERPT_CHARS // 2)
    shown = "…" if begin else ""
    for position in range(begin, len(text)):
        char = text[position]
        piece = char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        is_last = position == len(text) - 1
        if len(shown) + len(piece) + (not is_last) > EXCERPT_CHARS:
            return shown + "…"
        shown += piece
    return shown


def counted(count: int, name: str) -> str:
    """A number of things, in words.

    >>> counted(1, "row"), counted(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"


def refusal(what: str, findings: Sequence[Finding], *, do: str, num_faults: int | None = None) -> DataError:
    """One error for all findings: the first 20 in full, and how many there are."""
    count = len(findings) if num_faults is None else num_faults
    lines = [what]
    for finding in findings[:NUM_SHOWN]:
        seen = f" (here: {finding.excerpt})" if finding.excerpt else ""
        lines += [f"  {finding.where}: {finding.message}{seen}", f"      fix: {finding.fix}"]
    if count > NUM_SHOWN:
        lines.append(f"  and {count - NUM_SHOWN:,} more")
    return DataError("\n".join(lines), do=do, findings=tuple(findings))
