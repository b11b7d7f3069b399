"""Settings of the text."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ast_sparse.config.section import Section, about


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(Section):
    """How the shares of domains follow their held-out losses at every evaluation (paper Sec. 7)."""

    _name = "data.update"
    type: Literal["constant", "doremi", "bandit"] = field(
        default="constant", metadata=about("The rule; doremi and bandit need a target loss for every domain.")
    )
    rate: float = field(default=1.0, metadata=about("η, by which a loss above its target raises a share."))
    floor: float = field(default=1e-4, metadata=about("c, spread evenly over the domains."))
    clip: bool = field(default=False, metadata=about("Losses below their targets count as on them."))

    def _validate(self) -> None:
        self._require(self.rate >= 0, "rate", "must be 0 or more.")
        self._require(0 <= self.floor <= 1, "floor", "must lie between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Text to train on and to hold out."""

    _name = "data"
    root: str | None = field(default=None, metadata=about("Folder that relative paths start from."))
    train: tuple[str | dict[str, Any], ...] = field(
        metadata=about(
            "Files (text, JSONL, parquet; globs), folders of `ast-data prepare`, or `datasets.load_dataset` arguments; "
            "one source an entry."
        )
    )
    eval: tuple[str | dict[str, Any], ...] | None = field(
        default=None, metadata=about("Held-out sources; default: a share of `train`.")
    )
    eval_share: float = field(default=0.02, metadata=about("Share of the documents held out of training, 0 to 0.5."))
    text_field: str = field(default="text", metadata=about("Name of the text column or key."))
    block_size: int = field(default=1024, metadata=about("Tokens of a training sequence."))
    seed: int = field(default=0, metadata=about("Chooses the held-out documents."))

    def _validate(self) -> None:
        self._require(len(self.train) > 0, "train", "names no source. List at least one file.")
        self._require(self.eval is None or len(self.eval) > 0, "eval", "names no source. List files, or remove it.")
        for key in ("train", "eval"):
            entries = getattr(self, key) or ()
            self._require("" not in entries and {} not in entries, key, "has an empty entry. Fill or remove it.")
        self._require(0 <= self.eval_share <= 0.5, "eval_share", "must lie between 0 and 0.5.")
        self._require(self.block_size >= 2, "block_size", "must be at least 2 tokens.")
