"""Draw the figure of README.md from the results in scripts/studies/results.

python scripts/studies/headline.py      # needs the extra plots; writes results/headline.png
"""

import csv
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ast_sparse.report import plots

RESULTS = Path(__file__).parent / "results"
GREY, ONE_SHOT, RETRAINED = "#555555", "#E69F00", "#0072B2"
TEXT = {GREY: GREY, ONE_SHOT: "#8A5F00", RETRAINED: RETRAINED}  # orange letters are too pale
PLACES = (0.0, 1.5, 2.5, 3.5, 5.0, 6.0, 7.0)  # of the dense model, three pruned ones and three retrained ones
TRAINED = {
    "naive": "Fixed mask, no teacher",
    "no distillation": "AST without its teacher",
    "AST": "AST",
}


def read_rows() -> tuple[float, list[tuple[str, float, str]], int, float]:
    """The dense perplexity; name, perplexity and colour of each sparse model; tokens and minutes of AST training."""
    printed = json.loads((RESULTS / "smollm2.json").read_text(encoding="utf-8"))
    with (RESULTS / "table4" / "results.csv").open(encoding="utf-8", newline="") as file:
        study = {row["variant"]: row for row in csv.DictReader(file)}
    one_shot = printed["oneshot"]["perplexity"]
    rows = [(name[0].upper() + name[1:], float(value), ONE_SHOT) for name, value in one_shot.items() if name != "dense"]
    rows += [(label, float(study[name]["wikitext2"]), RETRAINED) for name, label in TRAINED.items()]
    tokens, seconds = int(study["AST"]["tokens"]), float(study["AST"]["train_seconds"])
    return float(study["dense"]["wikitext2"]), rows, tokens, seconds / 60


def read_sizes() -> tuple[float, float]:
    """Megabytes of the dense and the compressed model in bfloat16."""
    sizes = json.loads((RESULTS / "smollm2.json").read_text(encoding="utf-8"))["retrained"]["bfloat16_megabytes"]
    return sizes["dense"], sizes["compressed"]


def draw() -> Figure:
    """A dot for each model, a line from the dense perplexity to it, on a logarithmic axis."""
    dense, rows, tokens, minutes = read_rows()
    names = ["Dense", *(name for name, _, _ in rows)]
    values = [dense, *(value for _, value, _ in rows)]
    colours = [GREY, *(colour for _, _, colour in rows)]
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    axes = figure.subplots()
    axes.axvline(dense, color=GREY, linewidth=1, linestyle="--")
    axes.hlines(PLACES, dense, values, colors=colours, linewidth=5)
    axes.scatter(values, PLACES, s=130, c=colours, zorder=3)
    for name, place, value, colour in zip(names, PLACES, values, colours, strict=True):
        axes.annotate(
            f"{value:,.0f}", (value, place), xytext=(11, 0), textcoords="offset points", va="center",
            color=TEXT[colour], fontsize=13, fontweight="bold" if name in ("Dense", "AST") else "normal",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(20, 9000)
    axes.set_xticks([30, 100, 300, 1000, 3000], ["30", "100", "300", "1,000", "3,000"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(PLACES, names, fontsize=12)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(7.7, -0.7)
    axes.grid(axis="y", visible=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("WikiText-2 perplexity (logarithmic, lower is better)", fontsize=12)
    dense_size, sparse_size = read_sizes()
    _note(axes, 0.0, f"{dense_size:.0f} MB", GREY)
    _note(axes, 2.3, f"pruned in one shot, 2:4, {sparse_size:.0f} MB", ONE_SHOT)  # below the longest line
    _note(axes, 5.0, f"retrained, 2:4, {sparse_size:.0f} MB", RETRAINED)
    _note(axes, 6.15, f"{tokens:,} tokens,\n{minutes:.0f} minutes for AST on one CPU thread", RETRAINED)
    title = "SmolLM2-135M with two of every four weights pruned"
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    return figure


def _note(axes: Axes, place: float, text: str, colour: str) -> None:
    axes.annotate(
        text, (0.99, place), xycoords=("axes fraction", "data"), ha="right", va="center", color=TEXT[colour],
        fontsize=11.5,
    )  # fmt: skip


if __name__ == "__main__":
    with plots.styled():
        draw().savefig(RESULTS / "headline.png", dpi=150, facecolor="white")
