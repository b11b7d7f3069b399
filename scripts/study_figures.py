"""The figures of a study, as PNG for print: perplexity by variant and over alpha, flip rates, losses."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from study_results import Figures, Outcome, dataset_names, dense_figures

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

# Okabe and Ito's colours, told apart by the colour-blind; line and marker differ as well, for grey print
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":", (0, (6, 2)), (0, (3, 1, 1, 1, 1, 1)), "-")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: Any = {
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.6, "lines.markersize": 5,
}  # fmt: skip
_DENSE_TICKS = 300  # a larger ratio has no room for the ticks 2 and 5
_WIDE = 4  # a larger ratio of perplexities is drawn on a logarithmic axis
_MARKS = 12  # at most so many markers on a line


def draw(name: str, outcomes: Sequence[Outcome], path: Path) -> bool:
    """Draw a figure of that name; False if nothing was recorded for it, and no file is left."""
    with matplotlib.rc_context(_STYLE):
        figure = _FIGURES[name](outcomes)
        if figure is None:
            path.unlink(missing_ok=True)
            return False
        figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close(figure)
    return True


def _perplexity(outcomes: Sequence[Outcome]) -> Figure | None:
    """Horizontal bars by variant, a panel for each data set, the dense model as a dashed line."""
    datasets = [name for name in dataset_names(outcomes) if any(name in outcome.final for outcome in outcomes)]
    if not datasets:
        return None
    names = [outcome.name for outcome in outcomes]
    size = (1.2 + 3.6 * len(datasets), 1.1 + 0.36 * len(names))
    figure, panels = plt.subplots(1, len(datasets), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, dataset in zip(panels[0], datasets, strict=True):
        values = [_finite(outcome.final, dataset) for outcome in outcomes]
        missing = ["not finite" if dataset in outcome.final else "not measured" for outcome in outcomes]
        dense = _finite(dense_figures(outcomes), dataset)
        _bars(axes, values, missing, dense)
        axes.set_xlabel(_perplexity_label(outcomes, dataset))
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()  # of all panels
    return figure


def _bars(axes: Axes, values: Sequence[float | None], missing: Sequence[str], dense: float | None) -> None:
    axes.barh(range(len(values)), [value or 0 for value in values], height=0.62, color=_COLOURS[0])
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    shown = [value for value in (*values, dense) if value is not None]
    if not shown:
        return
    low, high = min(shown), max(shown)
    if high / low > _WIDE:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.25, high * (high / low) ** 0.22)
        _plain_ticks(axes, "x")
    else:
        axes.set_xlim(0, high * 1.2)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for place, (value, why) in enumerate(zip(values, missing, strict=True)):
        axes.annotate(
            why if value is None else _rounded(value), (value or axes.get_xlim()[0], place), xytext=(4, 0),
            textcoords="offset points", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    if dense is not None:
        axes.axvline(dense, color="black", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"dense {_rounded(dense)}", (dense, 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
            textcoords="offset points", ha="left", va="bottom",
        )  # fmt: skip


def _flips(outcomes: Sequence[Outcome]) -> Figure | None:
    """Flip rate and initial flip rate at every mask refresh (paper Fig. 4)."""
    series = [(index, outcome) for index, outcome in enumerate(outcomes) if outcome.history]
    if not series:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.2), sharex=True, layout="constrained")
    for axes, key in zip(panels, ("flip_rate", "initial_flip_rate"), strict=True):
        for index, outcome in series:
            _line(axes, index, outcome.name, [(row["step"], 100 * row[key]) for row in outcome.history])
        axes.set_ylabel(f"{key.replace('_', ' ')}\n(% of masked weights)")
        axes.set_ylim(0, axes.get_ylim()[1])
        _step_axis(axes)
    _legend(figure, panels[0])
    return figure


def _losses(outcomes: Sequence[Outcome]) -> Figure | None:
    """Train loss, and test perplexity where it was measured during training (paper Fig. 2)."""
    series = [(index, outcome) for index, outcome in enumerate(outcomes) if outcome.logged("loss")]
    if not series:
        return None
    tested = _tested_dataset(outcomes)
    figure, panels = plt.subplots(
        1, 2 if tested else 1, figsize=(8.4 if tested else 4.6, 3.4), squeeze=False, layout="constrained"
    )
    axes = panels[0][0]
    window = max(1, max(len(outcome.logged("loss")) for _, outcome in series) // 20)
    for index, outcome in series:
        _line(axes, index, outcome.name, _running_mean(outcome.logged("loss"), window))
    axes.set_ylabel("train loss (nats per token" + (f",\nmean of {window} log entries)" if window > 1 else ")"))
    _step_axis(axes)
    if tested:
        _test_panel(panels[0][1], outcomes, tested)
    _legend(figure, axes)
    return figure


def _test_panel(axes: Axes, outcomes: Sequence[Outcome], key: str) -> None:
    dataset = key.removesuffix("_perplexity")
    values = []
    for index, outcome in enumerate(outcomes):
        points = [(step, value) for step, value in outcome.logged(key) if math.isfinite(value)]
        _line(axes, index, outcome.name, points)
        values += [value for _, value in points]
    dense = _finite(dense_figures(outcomes), dataset)
    if dense is not None:
        axes.axhline(dense, color="black", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"dense {_rounded(dense)}", (0, dense), xycoords=("axes fraction", "data"), xytext=(3, 3),
            textcoords="offset points",
        )  # fmt: skip
        values.append(dense)
    if values and max(values) / min(values) > _WIDE:
        axes.set_yscale("log")
        _plain_ticks(axes, "y")
    axes.set_ylabel("held-out perplexity" if dataset == "eval" else _perplexity_label(outcomes, dataset))
    _step_axis(axes)


def _alpha(outcomes: Sequence[Outcome]) -> Figure | None:
    """Perplexity over α of (4), of the training runs that differ in it."""
    trained = [outcome for outcome in outcomes if outcome.variant.kind == "train"]
    datasets = dataset_names(trained)
    if len({_alpha_of(outcome) for outcome in trained}) < 2 or not datasets:
        return None
    size = (0.6 + 3.8 * len(datasets), 3.1)
    figure, panels = plt.subplots(1, len(datasets), figsize=size, squeeze=False, layout="constrained")
    for index, (axes, dataset) in enumerate(zip(panels[0], datasets, strict=True)):
        points = [(_alpha_of(outcome), _finite(outcome.final, dataset)) for outcome in trained]
        drawn = sorted((alpha, value) for alpha, value in points if value is not None)
        axes.plot(*zip(*drawn, strict=True), color=_COLOURS[index], marker=_MARKERS[index])
        best = min(drawn, key=lambda point: point[1])
        axes.annotate(_rounded(best[1]), best, xytext=(0, -14), textcoords="offset points", ha="center")
        axes.margins(y=0.2)
        axes.set_xlim(-0.1, 1.1)
        axes.set_xlabel("α (0: cross-entropy alone, 1: distillation alone)")
        axes.set_ylabel(_perplexity_label(outcomes, dataset))
    return figure


def _alpha_of(outcome: Outcome) -> float:
    config = outcome.variant.config.distillation
    return 0.0 if config is None else config.weights[1]


def _line(axes: Axes, index: int, name: str, points: Iterable[tuple[int, float]]) -> None:
    drawn = list(points)
    style = index % len(_COLOURS)
    axes.plot(
        [step for step, _ in drawn], [value for _, value in drawn], label=name, color=_COLOURS[style],
        linestyle=_LINES[style], marker=_MARKERS[style], markevery=max(1, math.ceil(len(drawn) / _MARKS)),
    )  # fmt: skip


def _legend(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, above them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4))


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("optimizer steps")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _plain_ticks(axes: Axes, which: str) -> None:
    """1, 2, 5, 10, … on a logarithmic axis; powers of ten alone where these would run into each other."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < _DENSE_TICKS * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def _running_mean(points: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    values = [value for _, value in points]
    means = [sum(values[max(0, i + 1 - window) : i + 1]) / (i + 1 - max(0, i + 1 - window)) for i in range(len(values))]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def _tested_dataset(outcomes: Sequence[Outcome]) -> str | None:
    """The key of the perplexity that was logged during training: WikiText-2 before others."""
    keys = {
        key for outcome in outcomes for entry in outcome.state.get("log_history", ())
        for key in entry if key.endswith("_perplexity")
    }  # fmt: skip
    return min(keys, key=lambda key: (key != "wikitext2_perplexity", key == "eval_perplexity", key), default=None)


def _perplexity_label(outcomes: Sequence[Outcome], dataset: str) -> str:
    figures = next((outcome.final[dataset] for outcome in outcomes if dataset in outcome.final), None)
    name = {"wikitext2": "WikiText-2 test", "heldout": "held-out text"}.get(dataset, Path(dataset).name)
    windows = f"\n({figures['windows']} windows of {figures['seq_len']} tokens)" if figures else ""
    return f"perplexity, {name}{windows}"


def _finite(figures: Figures, dataset: str) -> float | None:
    value = figures.get(dataset, {}).get("perplexity")
    return value if value is not None and math.isfinite(value) else None


def _rounded(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


_FIGURES: dict[str, Callable[[Sequence[Outcome]], Any]] = {
    "perplexity": _perplexity, "flips": _flips, "losses": _losses, "alpha": _alpha,
}  # fmt: skip
