"""Documents of a plain text or Markdown file.

A file with headings in the form of WikiText (` = Title = `) is split at its headings: a document is a
heading with the paragraphs under it. Markdown is split at its headings of the first two levels. Any other
file is split at blank lines: a document is a paragraph.
Knows nothing of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from phinetune.data.findings import Finding
from phinetune.data.formats.lines import text_lines

_HEADING = re.compile(r"\s*(=(?: =)*) \S.* \1\s*")
_MARKDOWN_HEADING = re.compile(r"#{1,2} +\S.*")
NUM_LINES_LOOKED_AT = 200
MARKDOWN_SUFFIXES = (".md", ".markdown")


def read_documents(path: Path) -> Iterator[tuple[int, str] | Finding]:
    """Each document with the line it begins on, or a Finding; holds one document in memory."""
    is_markdown = Path(path.name.removesuffix(".gz")).suffix.lower() in MARKDOWN_SUFFIXES
    heading = _MARKDOWN_HEADING if is_markdown else _HEADING
    has_headings = is_markdown or _has_headings(path)
    is_code = False
    lines: list[str] = []
    start = 0
    has_body = False
    for item in text_lines(path):
        if isinstance(item, Finding):
            yield item
            continue
        number, line = item
        is_code ^= is_markdown and line.lstrip().startswith(("```", "~~~"))
        is_heading = has_headings and not is_code and bool(heading.fullmatch(line))
        ends_here = (is_heading and has_body) or (not has_headings and not line.strip())
        if ends_here and lines:
            yield start, "\n".join(lines).rstrip("\n")
            lines, has_body = [], False
        if line.strip() or (is_markdown and lines):
            if not lines:
                start = number
            lines.append(line)
            has_body = has_body or not is_heading
    if lines:
        yield start, "\n".join(lines).rstrip("\n")


def _has_headings(path: Path) -> bool:
    for item in text_lines(path):
        if isinstance(item, Finding) or item[0] > NUM_LINES_LOOKED_AT:
            return False
        if _HEADING.fullmatch(item[1]):
            return True
    return False
