"""The figures of a study, as PNG for print: perplexity by variant and over alpha, flip rates, losses."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ast_sparse.report import plots
from ast_sparse.report.plots import COLOURS, MARKERS, WIDE, finite, rounded
from ast_sparse.run.stages import WIKITEXT2, logged_key
from scripts.studies.curves import curve_rows
from scripts.studies.results import Outcome, Results, dataset_names, dense_results


def draw(name: str, outcomes: Sequence[Outcome], path: Path) -> bool:
    """Draw the figure of that name; if nothing was recorded for it, leave no file and return False."""
    with plots.styled():
        figure = _FIGURES[name](outcomes)
        if figure is None:
            path.unlink(missing_ok=True)
            return False
        plots.save(figure, path)
    return True


def _perplexity(outcomes: Sequence[Outcome]) -> Figure | None:
    """Horizontal bars by variant, a panel for each data set, the dense model as a dashed line."""
    datasets = [name for name in dataset_names(outcomes) if any(name in outcome.final for outcome in outcomes)]
    if not datasets:
        return None
    names = [outcome.label for outcome in outcomes]
    size = (1.2 + 3.6 * len(datasets), 1.1 + 0.36 * len(names))
    figure, panels = plots.panels(1, len(datasets), size, sharey=True)
    for axes, dataset in zip(panels, datasets, strict=True):
        values = [_finite(outcome.final, dataset) for outcome in outcomes]
        missing = ["not finite" if dataset in outcome.final else "not measured" for outcome in outcomes]
        dense = _finite(dense_results(outcomes), dataset)
        _bars(axes, values, missing, dense)
        axes.set_xlabel(_perplexity_label(outcomes, dataset))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()  # of all panels
    return figure


def _bars(axes: Axes, values: Sequence[float | None], missing: Sequence[str], dense: float | None) -> None:
    axes.barh(range(len(values)), [value or 0 for value in values], height=0.62, color=COLOURS[0])
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    shown = [value for value in (*values, dense) if value is not None]
    if not shown:
        return
    low, high = min(shown), max(shown)
    if high / low > WIDE:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.25, high * (high / low) ** 0.22)
        plots.plain_ticks(axes, "x")
    else:
        axes.set_xlim(0, high * 1.2)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for place, (value, why) in enumerate(zip(values, missing, strict=True)):
        axes.annotate(
            why if value is None else rounded(value), (value or axes.get_xlim()[0], place), xytext=(4, 0),
            textcoords="offset points", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    if dense is not None:
        axes.axvline(dense, color="black", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"dense {rounded(dense)}", (dense, 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
            textcoords="offset points", ha="left", va="bottom",
        )  # fmt: skip


def _flips(outcomes: Sequence[Outcome]) -> Figure | None:
    """Flip rate and initial flip rate at every mask refresh (paper Fig. 4)."""
    return plots.flip_figure([(outcome.label, outcome.history) for outcome in outcomes])


def _losses(outcomes: Sequence[Outcome]) -> Figure | None:
    """Train loss, and test perplexity where it was measured during training (paper Fig. 2)."""
    if not any(outcome.logged("loss") for outcome in outcomes):
        return None
    tested = _tested_dataset(outcomes)
    figure, panels = plots.panels(1, 2 if tested else 1, (8.4 if tested else 4.6, 3.4))
    plots.loss_panel(panels[0], [(outcome.label, outcome.logged("loss")) for outcome in outcomes])
    if tested:
        names = {logged_key(name): name for name in dataset_names(outcomes)}
        dataset = "eval" if tested == "eval_perplexity" else names.get(tested, tested.removesuffix("_perplexity"))
        label = "held-out perplexity" if dataset == "eval" else _perplexity_label(outcomes, dataset)
        curves = [(outcome.label, outcome.logged(tested)) for outcome in outcomes]
        plots.perplexity_panel(panels[1], curves, label, {"dense": _finite(dense_results(outcomes), dataset)})
    plots.legend(figure, panels[0])
    return figure


def _curves(outcomes: Sequence[Outcome]) -> Figure | None:
    """Perplexity against tokens and against minutes; of several seeds the geometric mean, and a band over their range.

    A start far above where the curves end is cut off, so that those can be told apart. A curve without times is only in
    the first panel.
    """
    rows = [row for row in curve_rows(outcomes) if finite(row["perplexity"]) is not None]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    if not datasets:
        return None
    dataset = WIKITEXT2 if WIKITEXT2 in datasets else datasets[0]
    rows = [row for row in rows if row["dataset"] == dataset]
    figure, panels = plots.panels(1, 2, (8.4, 4.4), sharey=True)
    dense = _finite(dense_results(outcomes), dataset)
    for axes, (key, unit, label) in zip(panels, _CURVE_AXES, strict=True):
        for index, name in enumerate(dict.fromkeys(row["variant"] for row in rows)):
            _curve(axes, index, [row for row in rows if row["variant"] == name], key, unit)
        if dense is not None:
            axes.axhline(dense, color="black", linestyle="--", linewidth=1.2)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    panels[0].set_yscale("log")  # of both
    ends = {(row["variant"], row["seed"]): row["perplexity"] for row in rows}
    top = _HEADROOM * max(ends.values())
    if panels[0].get_ylim()[1] > top:
        panels[0].set_ylim(top=top)
    plots.plain_ticks(panels[0], "y")
    panels[0].set_ylabel(_perplexity_label(outcomes, dataset))
    if dense is not None:
        panels[0].annotate(
            f"dense {rounded(dense)}", (0, dense), xycoords=("axes fraction", "data"), xytext=(3, 3),
            textcoords="offset points",
        )  # fmt: skip
    plots.legend(figure, panels[0])
    return figure


def _curve(axes: Axes, index: int, rows: Sequence[dict[str, Any]], key: str, unit: float) -> None:
    """One variant: a point for each step that all of its seeds measured; with the last perplexity in its name."""
    seeds = {row["seed"] for row in rows}
    places, means, ranges = [], [], []
    for step in dict.fromkeys(row["step"] for row in rows):
        same = [row for row in rows if row["step"] == step]
        if len(same) == len(seeds) and all(row[key] is not None for row in same):
            values = [row["perplexity"] for row in same]
            places.append(fmean(row[key] for row in same) / unit)
            means.append(geometric_mean(values))
            ranges.append((min(values), max(values)))
    if not means:
        return
    plots.line(axes, index, f"{rows[0]['variant']}: {rounded(means[-1])}", zip(places, means, strict=True))
    if len(seeds) > 1:
        lowest, highest = zip(*ranges, strict=True)
        axes.fill_between(places, lowest, highest, color=COLOURS[index % len(COLOURS)], alpha=0.25, lw=0)


def _alpha(outcomes: Sequence[Outcome]) -> Figure | None:
    """Perplexity over α of (4), for training runs that differ in it."""
    trained = [outcome for outcome in outcomes if outcome.variant.kind == "train"]
    datasets = dataset_names(trained)
    if len({_alpha_of(outcome) for outcome in trained}) < 2 or not datasets:
        return None
    size = (0.6 + 3.8 * len(datasets), 3.1)
    figure, panels = plots.panels(1, len(datasets), size)
    for index, (axes, dataset) in enumerate(zip(panels, datasets, strict=True)):
        points = [(_alpha_of(outcome), _finite(outcome.final, dataset)) for outcome in trained]
        drawn = sorted((alpha, value) for alpha, value in points if value is not None)
        axes.plot(*zip(*drawn, strict=True), color=COLOURS[index], marker=MARKERS[index])
        best = min(drawn, key=lambda point: point[1])
        axes.annotate(rounded(best[1]), best, xytext=(0, -14), textcoords="offset points", ha="center")
        axes.margins(y=0.2)
        axes.set_xlim(-0.1, 1.1)
        axes.set_xlabel("α (0: cross-entropy alone, 1: distillation alone)")
        axes.set_ylabel(_perplexity_label(outcomes, dataset))
    return figure


def _alpha_of(outcome: Outcome) -> float:
    config = outcome.variant.config.distillation
    return 0.0 if config is None else config.weights[1]


def _tested_dataset(outcomes: Sequence[Outcome]) -> str | None:
    """The key of a perplexity that was logged during training, preferably on WikiText-2."""
    keys = {
        key for outcome in outcomes for entry in outcome.state.get("log_history", ())
        for key in entry if key.endswith("_perplexity")
    }  # fmt: skip
    return min(keys, key=lambda key: (key != "wikitext2_perplexity", key == "eval_perplexity", key), default=None)


def _perplexity_label(outcomes: Sequence[Outcome], dataset: str) -> str:
    result = next((outcome.final[dataset] for outcome in outcomes if dataset in outcome.final), None)
    name = {"wikitext2": "WikiText-2 test", "heldout": "held-out text"}.get(dataset, Path(dataset).name)
    windows = f"\n({result['windows']} windows of {result['seq_len']} tokens)" if result else ""
    return f"perplexity, {name}{windows}"


def _finite(results: Results, dataset: str) -> float | None:
    return finite(results[dataset]["perplexity"] if dataset in results else None)


_HEADROOM = 2.5  # times the highest end of a curve
_CURVE_AXES = (  # column of curves.csv, its unit, the label
    ("tokens", 1000, "thousand tokens trained on"), ("seconds", 60, "minutes of work, the start included"),
)  # fmt: skip
_FIGURES: dict[str, Callable[[Sequence[Outcome]], Any]] = {
    "perplexity": _perplexity, "curves": _curves, "flips": _flips, "losses": _losses, "alpha": _alpha,
}  # fmt: skip
