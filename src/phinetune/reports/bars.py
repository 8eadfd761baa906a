"""A histogram as SVG without scripts or fonts of its own; its colours follow the page where there is one."""

# ruff: noqa: E501 (SVG reads best with an element on a line)
from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from phinetune.data.histogram import Bin

_ROW, _LABEL, _WIDTH, _BAR = 22, 120, 640, 420


def bars_svg(bins: Sequence[Bin], title: str) -> str:
    """One bar for each bin, its label left and its count right. Longest bar: the commonest bin."""
    greatest = max((bin.count for bin in bins), default=1) or 1
    height = _ROW * len(bins) + 34
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<text x="0" y="16" font-weight="600" fill="var(--ink, #1f2328)">{escape(title)}</text>',
    ]
    for number, bin in enumerate(bins):
        y = 30 + number * _ROW
        width = _BAR * bin.count / greatest
        out += [
            f'<text x="{_LABEL - 10}" y="{y + 13}" text-anchor="end" fill="var(--faint, #59636e)">{escape(bin.label)}</text>',
            f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_ROW - 6}" rx="2" fill="var(--train, #0072b2)"/>',
            f'<text x="{_LABEL + width + 8:.1f}" y="{y + 13}" fill="var(--ink, #1f2328)">{bin.count:,}</text>',
        ]
    return "\n".join([*out, "</svg>"]) + "\n"
