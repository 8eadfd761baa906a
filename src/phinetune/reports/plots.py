"""The course of a run as one picture: losses above, learning rate below.

Colours are told apart without red and green (Okabe and Ito's palette), and shapes differ too. The same
events give the same bytes. Knows nothing of pages.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from phinetune.base.files import write_atomically
from phinetune.reports.history import History, read_history

INK, FAINT, GRID = "#1f2328", "#6e7781", "#d8dee4"
TRAIN_RAW, TRAIN, TEST, BEST, RATE = "#9ecae9", "#0072b2", "#d55e00", "#cc79a7", "#009e73"
MAX_POINTS = 1000
STYLE: Any = {
    "svg.hashsalt": "phinetune",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
}

Floats = NDArray[np.float64]


def loss_plot(events_path: Path, picture_path: Path) -> None:
    """Draw the losses of an event file into `picture_path`: PNG when its suffix is .png, else SVG.

    Raises `UserError` when there is no event file.
    """
    found = read_history(events_path)
    picture_path.parent.mkdir(parents=True, exist_ok=True)
    title = f"Loss of run {events_path.absolute().parent.name}"
    write_atomically(
        picture_path, picture(found, title, kind="png" if picture_path.suffix == ".png" else "svg")
    )


def picture(
    found: History, title: str, *, kind: str = "svg", size_inches: tuple[float, float] = (8, 5)
) -> bytes:
    """The picture as bytes of an SVG or PNG file."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size_inches, layout="constrained")
        figure.patch.set_alpha(0.0 if kind == "svg" else 1.0)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        for axes in (above, below):
            axes.patch.set_alpha(0.0)
        _losses(above, found)
        _learning_rate(below, found)
        if title:
            above.set_title(title, loc="left", fontsize=12, parse_math=False)
        below.set_xlabel("step")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _losses(axes: Any, found: History) -> None:
    axes.set_ylabel("loss per trained token")
    steps, losses = _points([(entry.step, entry.loss) for entry in found.steps])
    if len(losses):
        steps, losses, bin_size = _thinned(steps, losses)
        label = "training" if bin_size == 1 else f"training, mean of {bin_size} steps"
        marker = "o" if len(losses) < 3 else None
        if len(losses) >= 20:
            axes.plot(steps, losses, color=TRAIN_RAW, linewidth=0.8, label=label)
            axes.plot(steps, smoothed(losses), color=TRAIN, linewidth=1.8, label="training, smoothed")
        else:
            axes.plot(steps, losses, color=TRAIN, linewidth=1.8, marker=marker, label=label)
    steps, losses = _points([(entry.step, entry.loss) for entry in found.evaluations])
    if len(losses):
        axes.plot(steps, losses, "D-", color=TEST, linewidth=1.2, markersize=5, label="test")
    if best := found.best:
        axes.plot(
            [best.step], [best.loss], "o", markersize=13, fillstyle="none", markeredgewidth=1.8,
            color=BEST, label=f"best test loss {best.loss:.3f} at step {best.step}",
        )  # fmt: skip
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
        axes.margins(x=0.02)
    else:
        axes.text(0.5, 0.5, "no step was recorded", transform=axes.transAxes, ha="center", color=FAINT)


def _learning_rate(axes: Any, found: History) -> None:
    axes.set_ylabel("learning\nrate")
    steps, rates = _points([(entry.step, entry.learning_rate) for entry in found.steps])
    if len(rates):
        steps, rates, _ = _thinned(steps, rates)
        axes.plot(steps, rates, color=RATE, linewidth=1.4, marker="o" if len(rates) < 3 else None)
        axes.set_ylim(0, max(float(rates.max()) * 1.15, 1e-12))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))


def _points(pairs: list[tuple[int, float | None]]) -> tuple[Floats, Floats]:
    """Steps and values; a value that was not finite leaves a gap."""
    if not any(value is not None for _, value in pairs):
        return np.empty(0), np.empty(0)
    steps = np.array([step for step, _ in pairs], dtype=np.float64)
    return steps, np.array([np.nan if value is None else value for _, value in pairs], dtype=np.float64)


def _thinned(steps: Floats, values: Floats) -> tuple[Floats, Floats, int]:
    """At most `MAX_POINTS` means of neighbours, and how many steps each stands for."""
    size = -(-len(values) // MAX_POINTS)
    if size == 1:
        return steps, values, 1
    bins = [slice(start, start + size) for start in range(0, len(values), size)]
    means = [values[part][~np.isnan(values[part])] for part in bins]
    kept = np.array([part.mean() if len(part) else np.nan for part in means])
    return np.array([steps[part].mean() for part in bins]), kept, size


def smoothed(values: Floats) -> Floats:
    """A centred mean over a tenth of the points, narrower towards both ends: it neither lags nor shifts."""
    half = max(1, len(values) // 20)
    means = np.full_like(values, np.nan)
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        window = window[~np.isnan(window)]
        if len(window):
            means[index] = window.mean()
    return means
