"""Settings of the data."""

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ast_sparse.config.convert import convert
from ast_sparse.config.section import Section, about
from ast_sparse.errors import UserError, shown, shown_name

BOS_CHOICES = ("auto", "none", "document", "block", "window")
_DOMAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ROUNDING = 1e-6
_SHARES = "Give a share to every domain, or to none: then shares follow the size of the text."


@dataclass(frozen=True, kw_only=True)
class DomainConfig(Section):
    """Text of one domain, and its share of the mixture."""

    _name = "data.domains"
    train: tuple[str | dict[str, Any], ...] = field(metadata=about("As `data.train`."))
    eval: tuple[str | dict[str, Any], ...] | None = field(default=None, metadata=about("As `data.eval`."))
    share: float | None = field(default=None, metadata=about("Share of the samples at the start; default: by size."))
    target: float | None = field(default=None, metadata=about("Target held-out loss, in nats per token."))


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(Section):
    """Shares of the domains, and how each evaluation's held-out losses change them (paper Sec. 7)."""

    _name = "data.update"
    shares: dict[str, Any] | None = field(default=None, metadata=about("Share of each domain; default: by size."))
    targets: dict[str, Any] | None = field(default=None, metadata=about("Target loss of each domain."))
    type: Literal["constant", "doremi", "bandit"] = field(
        default="constant", metadata=about("The rule; doremi and bandit need a target loss for every domain.")
    )
    rate: float = field(default=1.0, metadata=about("η: how strongly a loss above its target raises a share."))
    floor: float = field(default=1e-4, metadata=about("c: the part spread evenly over the domains."))
    clip: bool = field(default=False, metadata=about("Whether losses below their targets count as equal to them."))

    def _validate(self) -> None:
        self._require(self.rate >= 0, "rate", "must be 0 or more.")
        self._require(0 <= self.floor <= 1, "floor", "must lie between 0 and 1.")
        for key in ("shares", "targets"):
            numbers = {
                name: convert(value, float, f"data.domains.{name}.{key.removesuffix('s')}")
                for name, value in (getattr(self, key) or {}).items()
            }
            object.__setattr__(self, key, numbers or None)
        for name, share in (self.shares or {}).items():
            if share < 0:
                raise UserError(f"data.domains.{name}.share={share} must be 0 or more.")
        total = math.fsum((self.shares or {"all": 1.0}).values())
        if abs(total - 1) > _ROUNDING:
            raise UserError(f"data.domains: the shares add up to {total:.6g}, not 1. Correct them.")
        if self.shares is not None:
            self.check_names(self.shares)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise UserError unless every domain has what the rule needs."""
        for name in names:
            if self.shares is not None and name not in self.shares:
                raise UserError(f"data.domains.{name}.share is missing. {_SHARES}")
            if self.type != "constant" and name not in (self.targets or {}):
                raise UserError(
                    f"data.domains.{name}.target is missing, and data.update.type={self.type} needs a target loss for "
                    "every domain. Give it, or set data.update.type: constant."
                )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Training text and held-out text."""

    _name = "data"
    root: str | None = field(default=None, metadata=about("Folder that relative paths start from."))
    train: tuple[str | dict[str, Any], ...] | None = field(
        default=None,
        metadata=about(
            "Files (text, JSONL, parquet; globs), folders of `ast-data prepare`, or `datasets.load_dataset` arguments; "
            "one source per entry. Required unless there are domains."
        ),
    )
    eval: tuple[str | dict[str, Any], ...] | None = field(
        default=None, metadata=about("Held-out sources; default: a share of `train`.")
    )
    eval_share: float = field(
        default=0.02,
        metadata=about(
            "Share of the documents to hold out, 0 to 0.5; of a source with fewer than 20 documents, share of its "
            "tokens, the last ones."
        ),
    )
    text_field: str = field(default="text", metadata=about("Name of the text column or key."))
    block_size: int = field(default=1024, metadata=about("Tokens in a training sequence."))
    packing: Literal["joined", "documents"] = field(
        default="joined",
        metadata=about(
            "documents: attention stays inside a document, its positions begin at 0, and its first token is not "
            "predicted; joined: a document attends to those before it in the block."
        ),
    )
    bos: Literal["auto", "none", "document", "block", "window"] = field(
        default="auto",
        metadata=about(
            "BOS in the text, including that of calibration and evaluation.datasets. none: no BOS; document: before "
            "each document; block or window: before each block; auto: as the tokenizer does with a document; shards "
            "are used as they are. Chat templates add their own."
        ),
    )
    streaming: bool = field(
        default=False,
        metadata=about("Tokenise `train` during training; data sets on the hub are not downloaded."),
    )
    domains: dict[str, Any] | None = field(
        default=None, metadata=about("NAME: {train, eval, share, target}: a mixture of domains, instead of `train`.")
    )
    update: dict[str, Any] | None = field(
        default=None,
        metadata=about("{type: constant, doremi or bandit; rate, floor, clip}: how shares follow held-out losses."),
    )
    seed: int = field(default=0, metadata=about("Random seed for choosing the held-out documents."))

    def _validate(self) -> None:
        if self.train is None and not self.domains:
            raise UserError("data.train is missing. Name text in it, or domains in data.domains.")
        for key in ("train", "eval"):
            value = getattr(self, key)
            self._require(not (value and self.domains), key, "cannot be combined with data.domains. Give one of them.")
            self._check_entries(key, value)
        self._require(0 <= self.eval_share <= 0.5, "eval_share", "must lie between 0 and 0.5.")
        self._require(self.block_size >= 2, "block_size", "must be at least 2 tokens.")
        if self.streaming:
            problem = "does not support domains. Make shards with ast-data prepare."
            self._require(self.domains is None, "streaming", problem)
            problem = "cannot hold out documents of the stream. Name data.eval, or set data.eval_share: 0."
            self._require(bool(self.eval) or self.eval_share == 0, "streaming", problem)
        if self.domains is None:
            self._require(not self.update, "update", "needs data.domains. Name domains, or remove it.")
            return
        for name, domain in self.domain_configs.items():
            self._check_entries(f"domains.{name}.train", domain.train)
            self._check_entries(f"domains.{name}.eval", domain.eval)
        having = {name for name, domain in self.domain_configs.items() if domain.eval}
        if having and (lacking := sorted(self.domains.keys() - having)):
            raise UserError(
                f"data.domains.{lacking[0]}.eval is missing. Name held-out text for every domain, or for none: then "
                "data.eval_share of each is held out."
            )
        shares = {name: domain.share for name, domain in self.domain_configs.items()}
        lacking = sorted(name for name, share in shares.items() if share is None)
        if lacking and len(lacking) < len(shares):
            raise UserError(f"data.domains.{lacking[0]}.share is missing. {_SHARES}")
        self.mixture.check_names(self.domains)

    def _check_entries(self, key: str, entries: tuple[Any, ...] | None) -> None:
        if entries is not None and not entries:
            fix = "List files, or remove it." if key.endswith("eval") else "List at least one file."
            raise UserError(f"data.{key}=() names no source. {fix}")
        if "" in (entries or ()) or {} in (entries or ()):
            raise UserError(f"data.{key}={shown(entries)} has an empty entry. Fill or remove it.")

    @property
    def domain_configs(self) -> dict[str, DomainConfig]:
        """The domains by name; empty without a mixture."""
        found = {}
        known = [item.name for item in dataclasses.fields(DomainConfig)]
        for name, values in (self.domains or {}).items():
            if not isinstance(name, str) or not _DOMAIN_NAME.fullmatch(name):
                raise UserError(f"data.domains: the name {shown(name)} must consist of letters, digits, _ and -.")
            if not isinstance(values, dict):
                raise UserError(f"data.domains.{name}={shown(values)} is not a mapping. Write `train: FILE` below it.")
            for key in values:
                if key not in known:
                    raise UserError(f"Unknown key data.domains.{name}.{shown_name(key)}. Known: {', '.join(known)}.")
            if values.get("train") is None:
                raise UserError(f"data.domains.{name}.train is missing. Name its text.")
            try:
                found[name] = DomainConfig(**values)
            except UserError as error:
                raise error.renamed({f"data.domains.{key}": f"data.domains.{name}.{key}" for key in known}) from None
        return found

    @property
    def mixture(self) -> MixtureConfig:
        """The shares of the domains, and the rule that changes them."""
        domains = self.domain_configs
        known = ("type", "rate", "floor", "clip")
        for key in self.update or {}:
            if key not in known:
                raise UserError(f"Unknown key data.update.{shown_name(key)}. Known: {', '.join(known)}.")
        shares = {name: domain.share for name, domain in domains.items() if domain.share is not None}
        targets = {name: domain.target for name, domain in domains.items() if domain.target is not None}
        return MixtureConfig(shares=shares or None, targets=targets or None, **(self.update or {}))

    def entries(self, which: Literal["train", "eval"]) -> dict[str, tuple[str | dict[str, Any], ...]]:
        """The sources by the setting that names them, one for each domain; empty if none are named."""
        domains = self.domain_configs
        if not domains:
            return {f"data.{which}": value} if (value := getattr(self, which)) else {}
        found = {f"data.domains.{name}.{which}": getattr(domain, which) for name, domain in domains.items()}
        return {field: value for field, value in found.items() if value}
