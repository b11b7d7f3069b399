"""What all figures share: a style that also works in greyscale, lines, panels, axes and legends.

Figures are drawn without pyplot, so that a notebook's matplotlib is not changed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

# Okabe and Ito's colours, which colour-blind people can distinguish; lines and markers differ too, for greyscale
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (6, 2)), (0, (3, 1, 1, 1, 1, 1)), "-")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDE = 4  # perplexities with a larger ratio are drawn on a logarithmic axis
_STYLE: Any = {
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.6, "lines.markersize": 5,
}  # fmt: skip
_DENSE_TICKS = 300  # an axis with a larger ratio has no room for the ticks 2 and 5
_MARKS = 12  # maximum number of markers on a line

Points = Sequence[tuple[float, float]]


def styled() -> AbstractContextManager[None]:
    """Use the style of all figures in the block, where they are drawn and saved."""
    return matplotlib.rc_context(_STYLE)


def panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches and its panels, row by row."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=150, bbox_inches="tight")


def line(axes: Axes, index: int, name: str, points: Iterable[tuple[float, float]]) -> None:
    """Draw a line with the colour, dashes and markers of number `index`."""
    drawn = list(points)
    style = index % len(COLOURS)
    axes.plot(
        [step for step, _ in drawn], [value for _, value in drawn], label=name, color=COLOURS[style],
        linestyle=LINES[style], marker=MARKERS[style], markevery=max(1, math.ceil(len(drawn) / _MARKS)),
    )  # fmt: skip


def legend(figure: Figure, axes: Axes) -> None:
    """Put one legend for all panels above them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4))


def step_axis(axes: Axes) -> None:
    """Label the x-axis with optimizer steps."""
    axes.set_xlabel("optimizer steps")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def plain_ticks(axes: Axes, which: str) -> None:
    """Ticks 1, 2, 5, 10, … on a logarithmic axis; only powers of ten if the labels would overlap."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < _DENSE_TICKS * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def running_mean(points: Points, window: int) -> list[tuple[float, float]]:
    """For each step, the mean of its value and up to `window` − 1 values before it."""
    values = [value for _, value in points]
    means = [sum(values[max(0, i + 1 - window) : i + 1]) / (i + 1 - max(0, i + 1 - window)) for i in range(len(values))]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def rounded(value: float) -> str:
    """A perplexity as figures show it."""
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def finite(value: Any) -> float | None:
    """The number, or None if it is missing or not finite."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def loss_panel(axes: Axes, curves: Sequence[tuple[str, Points]], what: str = "train loss") -> None:
    """Losses over the steps, by name: running means over a twentieth of the log entries of the longest curve."""
    window = max(1, max(len(points) for _, points in curves) // 20)
    for index, (name, points) in enumerate(curves):
        if points:
            line(axes, index, name, running_mean(points, window))
    axes.set_ylabel(f"{what} (nats per token" + (f",\nmean of {window} log entries)" if window > 1 else ")"))
    step_axis(axes)


def perplexity_panel(
    axes: Axes, curves: Sequence[tuple[str, Points]], label: str, references: Mapping[str, float | None] | None = None
) -> None:
    """Perplexities over the steps, by name, and horizontal lines such as the dense model's.

    Missing values are left out. The axis is logarithmic if values are far apart.
    """
    values = []
    for index, (name, points) in enumerate(curves):
        drawn = [(step, value) for step, value in points if finite(value) is not None]
        line(axes, index, name, drawn)
        values += [value for _, value in drawn]
    for name, value in (references or {}).items():
        if value is None:
            continue
        axes.axhline(value, color="black", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{name} {rounded(value)}", (0, value), xycoords=("axes fraction", "data"), xytext=(3, 3),
            textcoords="offset points",
        )  # fmt: skip
        values.append(value)
    if values and max(values) / min(values) > WIDE:
        axes.set_yscale("log")
        plain_ticks(axes, "y")
    axes.set_ylabel(label)
    step_axis(axes)


def flip_figure(histories: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Figure | None:
    """Flip rate and initial flip rate at every mask refresh (paper Fig. 4), by name; None if nothing was recorded.

    Args:
        histories: rows of mask_history.jsonl.
    """
    series = [(index, name, rows) for index, (name, rows) in enumerate(histories) if rows]
    if not series:
        return None
    figure, both = panels(1, 2, (8.4, 3.2), sharex=True)
    for axes, key in zip(both, ("flip_rate", "initial_flip_rate"), strict=True):
        for index, name, rows in series:
            line(axes, index, name, [(row["step"], 100 * row[key]) for row in rows])
        axes.set_ylabel(f"{key.replace('_', ' ')}\n(% of masked weights)")
        axes.set_ylim(0, axes.get_ylim()[1])
        step_axis(axes)
    if len(histories) > 1:
        legend(figure, both[0])
    return figure
