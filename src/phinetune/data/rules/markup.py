"""Remnants of web pages in text: tags and entities. Code, and rows that ask for markup, are left alone."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from phinetune.data.findings import Finding
from phinetune.data.rules.base import RowCheck, RowView, Rule

MARKUP = Rule(
    id="html",
    severity="warning",
    meaning="tags and entities of web pages in text are learnt as part of the language",
    fix="take them out: phinetune data clean; keep markup that is meant between ``` lines",
    can_clean="tags are taken out, entities become their letters",
)

_NAMES = (
    "a|b|i|u|p|br|hr|em|div|span|strong|small|sub|sup|ul|ol|li|dl|dt|dd|h[1-6]|table|tbody|thead|tr|td|th"
)
_NAMES += (
    "|img|font|center|blockquote|pre|section|article|header|footer|nav|iframe|script|style|input|button|form"
)
_TAG = re.compile(rf"</?(?:{_NAMES})(?:\s[^<>]{{0,500}})?/?>", re.IGNORECASE)
_ENTITY = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|apos|#\d{2,6}|#x[0-9a-fA-F]{2,5}|[lr]squo|[lr]dquo|[mn]dash|hellip);"
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_BREAKS = re.compile(r"<br\s*/?>|</(?:p|div|li|tr|h[1-6])>", re.IGNORECASE)
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_MEANT = re.compile(
    r"\b(?:html|xml|xhtml|svg|css|jsx|markup|tags?|web ?pages?|href|ssml|entit(?:y|ies))\b", re.IGNORECASE
)


def remnant(text: str) -> re.Match[str] | None:
    """The first tag or entity outside code."""
    if "<" not in text and "&" not in text:
        return None
    bare = _CODE.sub(lambda code: " " * len(code.group()), text) if "`" in text else text
    return _TAG.search(bare) or _ENTITY.search(bare)


def without_markup(text: str) -> str:
    """The text without tags and entities; code stays as it is.

    >>> without_markup("Tea &amp; <b>cake</b><br>`<b>`")
    'Tea & cake\\n`<b>`'
    """
    if remnant(text) is None:
        return text
    parts, at = [], 0
    for code in _CODE.finditer(text):
        parts += [_plain(text[at : code.start()]), code.group()]
        at = code.end()
    plain = "".join([*parts, _plain(text[at:])])
    # Blocks end in line breaks; a text that had none at its ends gets none.
    return plain if text != text.strip() else plain.strip()


def _plain(text: str) -> str:
    text = _TAG.sub("", _BREAKS.sub("\n", _HIDDEN.sub("", text)))
    # Only the entities that are looked for: others may be meant.
    return _ENTITY.sub(lambda entity: html.unescape(entity.group()).replace("\xa0", " "), text)


def is_markup_meant(row: RowView) -> bool:
    """Whether a row is about markup."""
    return bool(_MEANT.search(row.prompt) or _MEANT.search(row.system))


class MarkupCheck(RowCheck):
    """Tags and entities in any turn."""

    def see(self, row: RowView) -> Iterator[Finding]:
        for field, _, text in row.parts:
            found = remnant(text)
            if found is None or is_markup_meant(row):
                continue
            message = f"{found.group()[:40]} is left over from a web page"
            yield MARKUP.finding(row.source, message, field=field, seen=text, around=found.start())
