"""How the tokens of a data file look in a terminal. Knows nothing of how they were made.

Where there is no colour (a pipe, NO_COLOR), brackets say what colours say elsewhere.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from phinetune.cli import console

if TYPE_CHECKING:
    from phinetune.text.render import Rendered, Renderer

_STYLES = {
    "trained": "bold green",
    "untrained": "dim",
    "control": "cyan",
    "trained control": "bold black on green",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShown:
    """One token: its id, its piece of the vocabulary, and what becomes of it."""

    id: int
    piece: str
    is_trained: bool
    is_control: bool
    is_beyond: bool
    part: bytes

    def record(self) -> dict[str, Any]:
        """The token as JSON, without its bytes: several tokens may share one character."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "part"}

    @property
    def kind(self) -> str:
        if self.is_control:
            return "trained control" if self.is_trained else "control"
        return "trained" if self.is_trained else "untrained"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShown:
    """One example with its counts; `num_beyond` tokens lie beyond the sequence length."""

    file: str
    line: int
    num_tokens: int
    num_trained: int
    num_beyond: int
    tokens: tuple[TokenShown, ...]

    def record(self) -> dict[str, Any]:
        """The row as JSON."""
        counts = {
            name: getattr(self, name) for name in ("file", "line", "num_tokens", "num_trained", "num_beyond")
        }
        return {**counts, "tokens": [token.record() for token in self.tokens]}


def preview_rows(renderer: Renderer, rendered: Sequence[Rendered], *, seqlen: int | None) -> list[RowShown]:
    """The rows of a preview."""
    return [_row(renderer, row, seqlen if seqlen is not None else row.num_tokens) for row in rendered]


def _row(renderer: Renderer, row: Rendered, seqlen: int) -> RowShown:
    tokenizer = renderer.tokenizer
    tokens = tuple(
        TokenShown(
            id=id_,
            piece=tokenizer.token(id_),
            is_trained=is_trained,
            is_control=tokenizer.is_control(id_),
            is_beyond=index >= seqlen,
            part=tokenizer.token_bytes(id_),
        )
        for index, (id_, is_trained) in enumerate(zip(row.ids.tolist(), row.trained.tolist(), strict=True))
    )
    return RowShown(
        file=row.source.file,
        line=row.source.line,
        num_tokens=row.num_tokens,
        num_trained=row.num_trained,
        num_beyond=max(0, row.num_tokens - seqlen),
        tokens=tokens,
    )


def show_preview(rows: Sequence[RowShown], *, seqlen: int | None, with_ids: bool) -> None:
    """Every row with its counts, then the legend."""
    has_colour = console.out().color_system is not None
    for row in rows:
        cut = f", {row.num_beyond:,} beyond {seqlen:,}" if row.num_beyond else ""
        counts = f"{row.num_tokens:,} tokens, {row.num_trained:,} trained{cut}"
        console.say(Text.assemble((f"{row.file}:{row.line}", "bold"), f"  {counts}"))
        console.say(row_text(row, has_colour=has_colour), "")
        if with_ids:
            console.say(_id_table(row), "")
    console.say(_legend(has_colour, is_cut=any(row.num_beyond for row in rows)))


def row_text(row: RowShown, *, has_colour: bool) -> Text:
    """The tokens as text, one style for each kind."""
    text = Text()
    for (kind, is_beyond), group in groupby(row.tokens, key=lambda token: (token.kind, token.is_beyond)):
        tokens = list(group)
        is_control = tokens[0].is_control
        for part in [[token] for token in tokens] if is_control else [tokens]:
            letters = b"".join(token.part for token in part).decode("utf-8", errors="replace")
            style = _STYLES[kind] + (" strike" if is_beyond else "")
            if has_colour:
                text.append(visible(letters), style)
            else:
                text.append(_bracketed(visible(letters), kind, is_beyond))
            if is_control:
                text.append("\n" if part[0].is_trained else " ")
    return text


def visible(text: str) -> str:
    """Line breaks shown and kept; everything else that cannot be printed escaped.

    >>> visible("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    line_end = "↵" if console.is_unicode(sys.stdout) else "\\n"
    shown = (
        line_end + "\n"
        if char == "\n"
        else char
        if char.isprintable()
        else char.encode("unicode_escape").decode("ascii")
        for char in text
    )
    return console.shown("".join(shown), sys.stdout)


def _bracketed(text: str, kind: str, is_beyond: bool) -> str:
    text = f"{{{{{text}}}}}" if kind.endswith("control") else text
    text = f"[[{text}]]" if kind.startswith("trained") else text
    return f"~~{text}~~" if is_beyond else text


def _legend(has_colour: bool, *, is_cut: bool) -> Text:
    if not has_colour:
        cut = ", ~~cut~~ beyond the sequence length" if is_cut else ""
        return Text(f"legend: [[trained]], not trained, {{{{control token}}}}{cut}")
    legend = Text.assemble(
        "legend: ",
        ("trained", _STYLES["trained"]),
        "  ",
        ("read, not trained", _STYLES["untrained"]),
        "  ",
        ("control token", _STYLES["control"]),
        "  ",
        ("trained control token", _STYLES["trained control"]),
    )
    return legend.append("  ").append("beyond the sequence length", "strike") if is_cut else legend


def _id_table(row: RowShown) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("place", justify="right", style="dim")
    table.add_column("id", justify="right")
    table.add_column("token")
    table.add_column("")
    for place, token in enumerate(row.tokens):
        words = [token.kind, "beyond"] if token.is_beyond else [token.kind]
        table.add_row(
            str(place), str(token.id), Text(visible(token.piece), _STYLES[token.kind]), ", ".join(words)
        )
    return table
