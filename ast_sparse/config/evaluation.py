"""Settings of what is measured during and after a run."""

from dataclasses import dataclass, field
from typing import Literal

from ast_sparse.config.section import Section, about


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Perplexities that `ast-train` reports for the dense, the one-shot and the retrained model."""

    _name = "evaluation"
    datasets: tuple[str, ...] = field(
        default=("heldout",), metadata=about("`heldout`, `wikitext2`, or text files; empty: none.")
    )
    seq_len: int | None = field(default=None, metadata=about("Window; default: the published one of the family."))
    windows: int | None = field(default=None, metadata=about("At most so many windows of each; default: all."))
    data_dir: str | None = field(default=None, metadata=about("Folder with wiki.test.raw, instead of the hub."))
    steps: int | None = field(
        default=None, metadata=about("Measure and log them during training too, every so many steps.")
    )
    report: bool = field(
        default=False,
        metadata=about("Write the page report/report.html with figures after training; needs ast-sparse[plots]."),
    )
    prompts: tuple[str, ...] = field(
        default=("The capital of France is", "A function in Python is defined with the keyword", "Water boils when"),
        metadata=about("Texts that each stage continues greedily for the report; empty: none."),
    )

    def _validate(self) -> None:
        self._require(all(map(str.strip, self.prompts)), "prompts", "has an empty entry. Fill or remove it.")
        self._require(self.seq_len is None or self.seq_len >= 2, "seq_len", "must be at least 2 tokens.")
        for key in ("windows", "steps"):
            self._require(getattr(self, key) is None or getattr(self, key) >= 1, key, "must be at least 1.")
        self._require("" not in self.datasets, "datasets", "has an empty entry. Fill or remove it.")
        mend = "has nothing to measure: evaluation.datasets is empty. Name a data set, or remove it."
        self._require(self.steps is None or len(self.datasets) > 0, "steps", mend)


@dataclass(frozen=True, kw_only=True)
class WatchConfig(Section):
    """What a run does when its loss is not finite, or jumps."""

    _name = "watch"
    nan: Literal["stop", "skip"] = field(
        default="stop",
        metadata=about("A loss or gradient that is not finite: end the run, or pass over the update."),
    )
    spike: Literal["off", "warn", "skip", "stop"] = field(
        default="off",
        metadata=about("A loss above `spike_factor` times the median of the last `spike_window` steps."),
    )
    spike_factor: float = field(default=3.0, metadata=about("How far above the median a loss may be, above 1."))
    spike_window: int = field(default=50, metadata=about("Steps of the median; so many come before the first verdict."))
    max_skips: int = field(default=10, metadata=about("Steps that may be skipped in a row before the run ends."))

    def _validate(self) -> None:
        self._require(self.spike_factor > 1, "spike_factor", "must be above 1.")
        for key in ("spike_window", "max_skips"):
            self._require(getattr(self, key) >= 1, key, "must be at least 1.")
