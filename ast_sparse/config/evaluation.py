"""Settings of the measurements during and after a run."""

from dataclasses import dataclass, field
from typing import Literal

from ast_sparse.config.section import Section, about


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Perplexities that `ast-train` reports for the dense, the one-shot and the retrained model."""

    _name = "evaluation"
    datasets: tuple[str, ...] = field(
        default=("heldout",), metadata=about("`heldout`, `wikitext2`, or text files; an empty list: none.")
    )
    seq_len: int | None = field(default=None, metadata=about("Window in tokens; default: as published for the family."))
    windows: int | None = field(default=None, metadata=about("Maximum number of windows per data set; default: all."))
    data_dir: str | None = field(default=None, metadata=about("Folder with wiki.test.raw, instead of the hub."))
    steps: int | None = field(
        default=None,
        metadata=about("Steps between logged measurements during training; default: no measurements during training."),
    )
    report: bool = field(
        default=False,
        metadata=about("After training, write report/report.html with figures; needs ast-sparse[plots]."),
    )
    prompts: tuple[str, ...] = field(
        default=("The capital of France is", "A function in Python is defined with the keyword", "Water boils when"),
        metadata=about("Texts that each stage's model continues greedily for the report; an empty list: none."),
    )

    def _validate(self) -> None:
        self._require(all(map(str.strip, self.prompts)), "prompts", "has an empty entry. Fill or remove it.")
        self._require(self.seq_len is None or self.seq_len >= 2, "seq_len", "must be at least 2 tokens.")
        for key in ("windows", "steps"):
            self._require(getattr(self, key) is None or getattr(self, key) >= 1, key, "must be at least 1.")
        self._require("" not in self.datasets, "datasets", "has an empty entry. Fill or remove it.")
        problem = "has nothing to measure: evaluation.datasets is empty. Name a data set, or remove it."
        self._require(self.steps is None or len(self.datasets) > 0, "steps", problem)


@dataclass(frozen=True, kw_only=True)
class WatchConfig(Section):
    """What a run does when its loss is not finite, or jumps."""

    _name = "watch"
    nan: Literal["stop", "skip"] = field(
        default="stop",
        metadata=about("A loss or gradient that is not finite. stop: end the run; skip: leave out the update."),
    )
    spike: Literal["off", "warn", "skip", "stop"] = field(
        default="off",
        metadata=about(
            "A loss above `spike_factor` times the median of `spike_window` steps. off: ignore it; warn: log it; skip: "
            "leave out the update; stop: end the run."
        ),
    )
    spike_factor: float = field(default=3.0, metadata=about("How many times the median a loss may be, above 1."))
    spike_window: int = field(default=50, metadata=about("Number of steps for the median; checks begin after them."))
    max_skips: int = field(default=10, metadata=about("Steps in a row that may be skipped before the run stops."))

    def _validate(self) -> None:
        self._require(self.spike_factor > 1, "spike_factor", "must be above 1.")
        for key in ("spike_window", "max_skips"):
            self._require(getattr(self, key) >= 1, key, "must be at least 1.")
