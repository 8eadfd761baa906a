"""Write a run's report: one HTML file that needs nothing else, neither network nor scripts.

Prompts and answers come from data sets that anybody may have written: all text is escaped, and the page
forbids itself to load or run anything. Knows nothing of how results were made.
"""

from __future__ import annotations

import re
from pathlib import Path

from markupsafe import Markup

from phinetune.base.files import write_atomically
from phinetune.reports import plots
from phinetune.reports.history import History, history, read_history
from phinetune.reports.templates import filled
from phinetune.reports.view import PageView, page_view

# The plot's fixed colours become the page's own, which follow the light or dark scheme.
_COLOURS = {
    plots.INK: "--ink",
    plots.FAINT: "--faint",
    plots.GRID: "--line",
    plots.TRAIN_RAW: "--train-raw",
    plots.TRAIN: "--train",
    plots.TEST: "--test",
    plots.BEST: "--best",
    plots.RATE: "--rate",
}


def report_html(run_folder: Path) -> Path:
    """Write `report.html` into a run folder from the files there, and return its path.

    Raises `UserError` when the folder holds no run or a file of it is damaged.
    """
    view = page_view(run_folder)
    events = run_folder / "events.jsonl"
    course = read_history(events) if events.is_file() else history([])
    path = run_folder / "report.html"
    write_atomically(path, page(view, _inline_plot(course)))
    return path


def page(view: PageView, plot: Markup) -> bytes:
    """The page as HTML; every text of `view` is escaped."""
    return filled("report.html.jinja", view=view, plot=plot)


def _inline_plot(course: History) -> Markup:
    svg = plots.picture(course, "", size_inches=(9, 4.6)).decode("utf-8")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, name in _COLOURS.items():
        svg = svg.replace(colour, f"var({name})")
    return Markup(svg)  # safe: drawn from numbers, it holds no text of others
