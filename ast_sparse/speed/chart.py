"""The figure of a comparison: tokens per second of both models, case by case."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from ast_sparse.report import plots
from ast_sparse.speed.outcomes import Outcome

_WIDTH = 0.38  # of a bar; cases are 1 apart
_HATCHES = ("", "//")


def draw(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Write a PNG: bars of decode and of prefill, with the 20th to 80th percentile and how much faster the first is."""
    measured = [outcome for outcome in outcomes if outcome.is_measured]
    with plots.styled():
        figure, (decode, prefill) = plots.panels(2, 1, (max(5.0, 1.5 + 0.85 * len(measured)), 6.0), sharex=True)
        for axes, index, what, name in ((prefill, 0, "prefill", "prefill"), (decode, 1, "step", "decode")):
            _bars(axes, measured, index, what)
            axes.set_ylabel(f"{name} (tokens per second)")
        prefill.set_xticks(
            range(len(measured)),
            [f"{each.case.prompt:,}/{each.case.new:,}\nbatch {each.case.batch}" for each in measured],
            fontsize=8,
        )
        faster = ", ×: how much faster" if len(measured[0].timings) > 1 else ""
        prefill.set_xlabel(f"prompt / new tokens\nlines: 20th to 80th percentile{faster}")
        prefill.set_xlim(-0.75, len(measured) - 0.25)
        decode.set_title(title)
        plots.legend(figure, decode)
        plots.save(figure, path)


def _bars(axes: Axes, measured: Sequence[Outcome], index: int, what: str) -> None:
    sides = list(measured[0].timings)
    tops = [0.0] * len(measured)
    for number, side in enumerate(sides):
        spreads = [outcome.tokens_per_second(side)[index] for outcome in measured]
        places = [place + (number - (len(sides) - 1) / 2) * _WIDTH for place in range(len(measured))]
        below = [max(spread.median - spread.p20, 0.0) for spread in spreads]
        above = [max(spread.p80 - spread.median, 0.0) for spread in spreads]
        axes.bar(
            places, [spread.median for spread in spreads], _WIDTH, yerr=(below, above), label=side, capsize=2,
            color=plots.COLOURS[number], hatch=_HATCHES[number], edgecolor="white",
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
        )  # fmt: skip
        tops = [max(top, spread.p80) for top, spread in zip(tops, spreads, strict=True)]
    for place, (outcome, top) in enumerate(zip(measured, tops, strict=True)):
        if (speedup := outcome.speedup(what)) is not None:
            axes.annotate(
                f"{speedup.median:.2f}×", (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=8
            )
    axes.margins(y=0.15)
    axes.grid(axis="x", visible=False)
