"""The figures of a report: losses and perplexities, flip rates, flips and density by layer, domain shares."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ast_sparse.report import plots
from ast_sparse.report.overview import Counts
from ast_sparse.storage.run_folder import Run

_SHARE = "domain_share/"
_TEST, _TEST_LOSS = "_perplexity", "eval_loss"
_LOGARITHMIC = 30  # rates with a larger ratio are coloured on a logarithmic scale
_DECADE = 10  # shares with a larger ratio are drawn on a logarithmic axis
_TITLE = 24  # characters in a line of the title of a density panel
_COLOURS = "cividis"  # its lightness rises evenly, so that it can be read in greyscale


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure, the name of its file without suffix, and what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure


def draw_runs(runs: Mapping[str, Run]) -> list[Picture]:
    """The figures of runs, given by the name they are shown under; figures without data are left out."""
    drawn = [_losses(runs), _flips(runs)]
    for number, (name, run) in enumerate(runs.items(), start=1):
        suffix, of = ("", "") if len(runs) == 1 else (f"_{number}", f", {name}")
        drawn += [_layer_flips(run, suffix, of), _domains(run, suffix, of)]
    return [picture for picture in drawn if picture is not None]


def _losses(runs: Mapping[str, Run]) -> Picture | None:
    """Train loss, held-out loss and every perplexity in the log: a panel for each, a line for each run."""
    keys = list(dict.fromkeys(key for run in runs.values() for key in run.logged_keys()))
    # a perplexity that is logged together with its loss would show the same curve again
    tested = [key for key in keys if key.endswith(_TEST) and f"{key.removesuffix(_TEST)}_loss" not in keys]
    shown = [key for key in ("loss", _TEST_LOSS) if key in keys] + tested
    if not shown:
        return None
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, panels = plots.panels(rows, columns, (4.3 * columns, 3.1 * rows))
    for axes, key in zip(panels, shown, strict=False):
        curves = [(name, run.logged(key)) for name, run in runs.items()]
        if key in ("loss", _TEST_LOSS):
            plots.loss_panel(axes, curves, "train loss" if key == "loss" else "held-out loss")
        else:
            references = _references(runs, key)
            plots.perplexity_panel(axes, curves, f"perplexity,\n{key.removesuffix(_TEST)}", references)
    for axes in panels[len(shown) :]:
        axes.remove()
    if len(runs) > 1:
        plots.legend(figure, panels[0])
    return Picture(
        name="losses",
        title="Loss and perplexity over the steps",
        caption="The train loss is the one that is minimised, the held-out loss is the cross-entropy of held-out text"
        + ("; perplexities are those of evaluation.steps. Dashed: the dense model." if tested else "."),
        figure=figure,
    )


def _references(runs: Mapping[str, Run], key: str) -> dict[str, float | None]:
    """The dense model's perplexity, if it is the same in all runs."""
    values = set()
    for run in runs.values():
        for dataset, result in run.stages.get("dense", {}).items():
            if key in (f"{dataset}{_TEST}", f"{dataset.rsplit('/', 1)[-1].rsplit('.', 1)[0]}{_TEST}"):
                values.add(plots.finite(result.get("perplexity")))
    return {"dense": values.pop()} if len(values) == 1 else {}


def _flips(runs: Mapping[str, Run]) -> Picture | None:
    figure = plots.flip_figure([(name, run.history) for name, run in runs.items()])
    if figure is None:
        return None
    return Picture(
        name="flips",
        title="Flip rate and initial flip rate",
        caption="At each mask refresh, the share of masked weights whose mask differs from the mask at the previous "
        "refresh, and from the mask at the start.",
        figure=figure,
    )


def _layer_flips(run: Run, suffix: str, of: str) -> Picture | None:
    rows = [row for row in run.history if isinstance(row.get("layers"), dict)]
    if not rows:
        return None
    steps = [row["step"] for row in rows]
    places = {name: layer_place(name) for name in rows[-1]["layers"]}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    flips = np.full((len(kinds), len(steps)), np.nan)
    for column, row in enumerate(rows):
        for index, kind in enumerate(kinds):
            rates = [rate[0] for name, rate in row["layers"].items() if places.get(name, ("",))[0] == kind]
            flips[index, column] = 100 * np.mean(rates) if rates else np.nan
    first = {name: 100 * rate[1] for name, rate in rows[-1]["layers"].items()}
    figure, (left, right) = plots.panels(1, 2, (8.4, 1.7 + 0.3 * len(kinds)), sharey=True)
    _heat(figure, left, flips, kinds, "flip rate, mean of the blocks (%)")
    ticks = np.unique(np.linspace(0, len(steps) - 1, min(8, len(steps))).round().astype(int))
    left.set_xticks(ticks, [str(steps[tick]) for tick in ticks])
    left.set_xlabel("optimizer steps (a column for each refresh)")
    _heat(figure, right, _matrix(first, kinds), kinds, "initial flip rate, last refresh (%)")
    right.set_xlabel("block")
    return Picture(
        name=f"layer_flips{suffix}",
        title=f"Flip rates by layer{of}",
        caption="In % of the masked weights. Left: the flip rate of each kind of layer over the mask refreshes. Right: "
        "the difference of each layer from its first mask. White: no flip.",
        figure=figure,
    )


def _domains(run: Run, suffix: str, of: str) -> Picture | None:
    """Shares of the domains over the steps, and their train and held-out losses."""
    names = [key.removeprefix(_SHARE) for key in run.logged_keys() if key.startswith(_SHARE)]
    parts = [
        (f"{_SHARE}{{}}", 100, "share of the sequences (%)"),
        ("domain_loss/{}", 1, "train loss (nats per token)"),
        ("eval_{}_loss", 1, "held-out loss (nats per token)"),
    ]
    parts = [part for part in parts if any(run.logged(part[0].format(name)) for name in names)]
    if not parts:
        return None
    columns = min(2, len(parts))
    rows = math.ceil(len(parts) / columns)
    figure, panels = plots.panels(rows, columns, (4.3 * columns, 0.4 + 3.0 * rows))
    for axes, (key, scale, label) in zip(panels, parts, strict=False):
        for index, name in enumerate(names):
            points = run.logged(key.format(name))
            plots.line(axes, index, name, [(step, scale * value) for step, value in points])
        axes.set_ylabel(label)
        plots.step_axis(axes)
    for axes in panels[len(parts) :]:
        axes.remove()
    shares = [share for name in names for _, share in run.logged(f"{_SHARE}{name}") if share > 0]
    if shares and max(shares) / min(shares) > _DECADE:
        panels[0].set_yscale("log")
        plots.plain_ticks(panels[0], "y")
    else:
        panels[0].set_ylim(bottom=0)
    plots.legend(figure, panels[0])
    return Picture(
        name=f"domains{suffix}",
        title=f"Domains over the steps{of}",
        caption="The share of the training sequences that come from each domain, and its losses.",
        figure=figure,
    )


def draw_density(counts: Mapping[str, Counts]) -> Picture | None:
    """Share of weights that are not zero in each linear layer of the blocks, a panel for each model."""
    shown = {}
    for model, layers in counts.items():
        if total := sum(entries for _, entries in layers.values()):
            share = sum(kept for kept, _ in layers.values()) / total
            title = f"{textwrap.fill(model, _TITLE)}\n{share:.1%}"
            shown[title] = {name: kept / entries for name, (kept, entries) in layers.items()}
    if not shown:
        return None
    kinds = list(dict.fromkeys(layer_place(name)[0] for shares in shown.values() for name in shares))
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, panels = plots.panels(
        rows, columns, (2.0 + 2.2 * columns, rows * (1.4 + 0.26 * len(kinds)) + 0.7), sharey=True
    )
    for axes, (name, shares) in zip(panels, shown.items(), strict=False):
        image = axes.imshow(_matrix(shares, kinds, 100), aspect="auto", cmap=_COLOURS, norm=Normalize(0, 100))
        _heat_axes(axes, kinds)
        axes.set_title(name, loc="left")
        axes.set_xlabel("block")
    for axes in panels[len(shown) :]:
        axes.remove()
    figure.colorbar(
        image, ax=panels[: len(shown)], location="bottom", shrink=0.5, aspect=40,
        label="weights that are not zero (% of the layer)",
    )  # fmt: skip
    return Picture(
        name="density",
        title="Mask density by layer",
        caption="Linear layers of the blocks; a layer that is not pruned has 100%, a layer pruned 2:4 has 50%.",
        figure=figure,
    )


def layer_place(name: str) -> tuple[str, int]:
    """Kind and block of a layer: `model.layers.3.mlp.experts.7.up_proj` is `mlp.experts.*.up_proj` of block 3."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return name, 0
    kind = ".".join("*" if part.isdigit() else part for part in parts[numbers[0] + 1 :])
    return kind, int(parts[numbers[0]])


def _matrix(values: Mapping[str, float], kinds: Sequence[str], scale: float = 1) -> Any:
    """Values by layer as `[kinds, blocks]`: the mean if a block has several layers of a kind, NaN if it has none."""
    places = {name: layer_place(name) for name in values}
    cells: dict[tuple[int, int], list[float]] = {}
    for name, value in values.items():
        kind, block = places[name]
        if kind in kinds:
            cells.setdefault((kinds.index(kind), block), []).append(scale * value)
    matrix = np.full((len(kinds), 1 + max(block for _, block in places.values())), np.nan)
    for place, found in cells.items():
        matrix[place] = np.mean(found)
    return matrix


def _heat(figure: Figure, axes: Axes, matrix: Any, kinds: Sequence[str], label: str) -> None:
    positive = matrix[np.isfinite(matrix) & (matrix > 0)]
    is_wide = positive.size > 0 and positive.max() / positive.min() > _LOGARITHMIC
    norm = LogNorm(positive.min(), positive.max()) if is_wide else Normalize(0, positive.max() if positive.size else 1)
    image = axes.imshow(matrix, aspect="auto", cmap=_COLOURS, norm=norm)
    _heat_axes(axes, kinds)
    bar = figure.colorbar(image, ax=axes, location="top", aspect=40, pad=0.02, label=label)
    if is_wide:
        plots.plain_ticks(bar.ax, "x")


def _heat_axes(axes: Axes, kinds: Sequence[str]) -> None:
    axes.set_yticks(range(len(kinds)), kinds)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
