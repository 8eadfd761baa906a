"""What the command line looks like: two streams, plain characters where needed, one form for errors.

Results go to standard output, everything else to standard error. The only place that shows an error.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from phinetune.base.errors import PhinetuneError, UserError
from phinetune.base.files import is_disk_full

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

DONE, FAILED, USER_INPUT, INTERRUPTED = 0, 1, 2, 130

# Used where the terminal cannot show the left one.
PLAIN = {"…": "...", "→": "->", "−": "-", "·": "-", "✓": "yes", "✗": "no", "×": "x", "≥": ">=", "≤": "<="}


class Interrupted(Exception):
    """Ctrl-C or SIGTERM in the midst of work; the text says what was kept."""

    def __init__(self, text: str, exit_code: int = INTERRUPTED) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def prepare_streams() -> None:
    """Never fail on a character that the terminal's encoding lacks: show `?` instead."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def is_unicode(stream: Any) -> bool:
    """Whether the stream can show characters beyond its own alphabet."""
    return (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "").startswith("utf")


def shown(text: str, stream: Any) -> str:
    """The text with plain stand-ins where the stream cannot show a character.

    >>> shown("512 × 4 → 2048", io.TextIOWrapper(io.BytesIO(), encoding="cp437"))
    '512 x 4 -> 2048'
    """
    if is_unicode(stream):
        return text
    for character, plain in PLAIN.items():
        text = text.replace(character, plain)
    return text


def out() -> Console:
    """The console for results."""
    return _console(sys.stdout)


def err() -> Console:
    """The console for progress, plans, warnings and errors."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    from rich.console import Console

    # A pipe has no width of its own: COLUMNS when it is set, else 100.
    width = None if stream.isatty() or os.environ.get("COLUMNS") else 100
    return Console(file=stream, width=width, highlight=False, emoji=False, markup=False, soft_wrap=False)


def say(*parts: RenderableType) -> None:
    """Print a part of the result on standard output."""
    console = out()
    for part in parts:
        console.print(shown(part, sys.stdout) if isinstance(part, str) else part)


def note(text: str, *, style: str = "") -> None:
    """Print a remark on standard error."""
    err().print(shown(text, sys.stderr), style=style or None)


def print_json(value: Any) -> None:
    """Print one JSON document on standard output and nothing else."""
    text = json.dumps(value, indent=1, ensure_ascii=not is_unicode(sys.stdout), allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def next_commands(*commands: str) -> None:
    """End a result with what to try next."""
    say("", "next")
    for command in commands:
        out().print(f"  {command}", style="cyan", soft_wrap=True)


def show_error(error: PhinetuneError, *, label: str = "error") -> None:
    """Show what happened, where, why and what to do, each part under the other and wrapped."""
    from rich.table import Table
    from rich.text import Text

    console = err()
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True, min_width=len("  where:"))
    grid.add_column(overflow="fold")
    grid.add_row(Text(f"{label}:", style="bold red"), Text(shown(error.what, sys.stderr), style="bold"))
    for name, text in (("where", error.where), ("why", error.why), ("do", error.do)):
        if text:
            grid.add_row(Text(f"  {name}:", style="dim"), Text(shown(text, sys.stderr)))
    console.print(grid)


def exit_code_of(error: PhinetuneError) -> int:
    """2 when the input is at fault, 1 when the run is."""
    return USER_INPUT if isinstance(error, UserError) else FAILED


def from_os_error(error: OSError) -> PhinetuneError:
    """An error of the operating system about a file, said in our form."""
    path = os.fspath(error.filename) if isinstance(error.filename, str | os.PathLike) else ""
    if is_disk_full(error) and not path:
        return PhinetuneError(
            "the disk is full",
            why=f"a file could not be written; temporary ones lie in {tempfile.gettempdir()}",
            do="free some space, or set TMPDIR to a folder on a larger disk",
        )
    what = (error.strerror or str(error)).strip()
    is_path_wrong = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return (UserError if is_path_wrong else PhinetuneError)(
        what[:1].lower() + what[1:],
        where=str(path),
        why="the operating system refused to read or write there" if path else "",
        do="check the path and its permissions" if path else "",
    )


def show_unexpected(error: BaseException) -> None:
    """A fault of ours: a short message, the traceback in a file that can be sent along."""
    name = f"phinetune-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    path = Path(tempfile.gettempdir()) / name
    text = "".join(traceback.format_exception(error))
    try:
        path.write_text(f"phinetune {' '.join(sys.argv[1:])}\n\n{text}", encoding="utf-8")
        place = f"the traceback is in {path}"
    except OSError:
        sys.stderr.write(text)
        place = "the traceback is above"
    message = str(error).strip().splitlines()
    show_error(
        PhinetuneError(
            f"unexpected {type(error).__name__}" + (f": {message[0][:200]}" if message else ""),
            why="this is a fault in phinetune, not in your input",
            do=place,
        )
    )


def stop(code: int) -> NoReturn:
    """Leave the command with this exit code."""
    import typer

    raise typer.Exit(code)
