"""`sparsity_config.json`: what is written beside a sparse model, and the only place that knows its keys."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ast_sparse.config import DistillationConfig, SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError, shown
from ast_sparse.storage import files

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class SparsityRecord:
    """How the weights of a folder became sparse.

    Attributes:
        content: what the file holds. A file of another version, or an edited one, may lack keys and have others; an
            export copies it, with absolute paths cut to their last part.
    """

    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_run(
        cls,
        *,
        version: str,
        base_model: str | None,
        base_commit: str | None,
        trained: Mapping[str, int],
        sparsity: SparsityConfig,
        slorb: SLoRBConfig | None,
        distillation: DistillationConfig | None,
        kernels: str,
        layers: Iterable[str],
    ) -> "SparsityRecord":
        """The record of a training run.

        Args:
            base_commit: of `base_model` on the hub; None for a local model.
            trained: `steps` and `tokens` so far.
            layers: names of the pruned ones.
        """
        return cls({
            "ast_sparse_version": version,
            "format_version": _FORMAT_VERSION,
            "base_model": base_model,
            "base_commit": base_commit,
            "trained": dict(trained),
            "pattern": sparsity.pattern,
            "sparsity": sparsity.to_dict(),
            "slorb": None if slorb is None else slorb.to_dict(),
            "distillation": None if distillation is None else distillation.to_dict(),
            "kernels": kernels,
            "layers": sorted(layers),
        })  # fmt: skip

    @classmethod
    def of_export(
        cls, *, pattern: str, has_slorb: bool, layers: Iterable[str], more: Mapping[str, Any]
    ) -> "SparsityRecord":
        """The record of an export whose source has none; `more` is what the caller adds, and may replace the rest."""
        return cls({"pattern": pattern, "slorb": {"enabled": has_slorb}, "layers": sorted(layers), **more})

    def with_adapter(self, name: str) -> "SparsityRecord":
        """The record of a model into which an adapter was merged under its masks."""
        merged = self.content.get("merged_adapters", [])
        return SparsityRecord(
            {**self.content, "merged_adapters": [*(merged if isinstance(merged, list) else []), name]}
        )

    def with_rounding(self, rounding: Mapping[str, Any]) -> "SparsityRecord":
        """The record of a model that was rounded to few bits; `before` in it is what an earlier rounding did."""
        before = self.content.get("rounding")
        return SparsityRecord({
            **self.content, "rounding": {**rounding, **({} if before is None else {"before": before})}
        })  # fmt: skip

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "SparsityRecord":
        """The record with the content of a file; values are checked when they are asked for."""
        return cls(content)

    @classmethod
    def read(cls, folder: Path) -> "SparsityRecord":
        """The record of a folder; empty if there is no such file.

        Raises:
            UserError: it is not a JSON object.
        """
        path = folder / files.SPARSITY_CONFIG_NAME
        return cls(files.read_json(path)) if path.is_file() else cls()

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return dict(self.content)

    def with_run(self, config: Mapping[str, Any], results: Mapping[str, Any]) -> "SparsityRecord":
        """The record of an export of a finished run, with the run's configuration and its results by stage."""
        return SparsityRecord({**self.content, "run": {"config": dict(config), "results": dict(results)}})

    def get(self, *path: str) -> Any:
        """A value by its keys; None if it or a section on the way to it is missing."""
        value: Any = self.content
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def pattern(self) -> str | None:
        """The pattern `N:M`, if any."""
        section = self.content.get("sparsity")
        pattern = section.get("pattern") if isinstance(section, dict) else self.content.get("pattern")
        return pattern if isinstance(pattern, str) else None

    @property
    def layers(self) -> list[str]:
        """Names of the pruned layers.

        Raises:
            UserError: they are not a list of names.
        """
        layers = self.content.get("layers", [])
        if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
            raise UserError(
                f"{files.SPARSITY_CONFIG_NAME}: `layers` is not a list of names. Restore the file, or remove it."
            )
        return layers

    @property
    def distillation(self) -> dict[str, Any] | None:
        """Settings of the distillation, if there are any."""
        section = self.content.get("distillation")
        return section if isinstance(section, dict) else None

    @property
    def kernels(self) -> Literal["eager", "compiled"]:
        """What masks and updates were computed with; eager if the record is older than this setting."""
        return "compiled" if self.content.get("kernels") == "compiled" else "eager"

    def settings(self, section: str) -> dict[str, Any]:
        """A section, which a checkpoint must have; empty if it is null.

        Raises:
            KeyError, TypeError: it is missing, or not a mapping.
        """
        return {**(self.content[section] or {})}

    def checkpoint_layers(self) -> set[str]:
        """Names of the pruned layers, which a checkpoint must have.

        Raises:
            KeyError, TypeError: they are missing, or not names.
        """
        return set(self.content["layers"])


def has_adapter(folder: Path, name: str | None = None) -> bool:
    """Whether a folder has a SLoRB adapter beside the model that `sparsity_config.json` does not turn off.

    Args:
        name: of the model, for messages; default: the folder.

    Raises:
        UserError: `sparsity_config.json` says there is one, but it is missing: the model would compute something else;
            or it says neither yes nor no.
    """
    files.check_inside(folder / files.ADAPTER_FOLDER)
    present = (folder / files.ADAPTER_FOLDER / files.ADAPTER_CONFIG_NAME).is_file()
    section = SparsityRecord.read(folder).content.get("slorb", present)
    enabled = section.get("enabled", True) if isinstance(section, dict) else bool(section)
    name = name or str(folder)
    if not isinstance(section, dict | bool | None) or not isinstance(enabled, bool):
        raise UserError(
            f"`{name}/{files.SPARSITY_CONFIG_NAME}`: slorb={shown(section)} is neither settings nor true or false. "
            "Restore the file."
        )
    if enabled and not present:
        raise UserError(
            f"`{name}` was trained with SLoRB, but its adapter `{name}/{files.ADAPTER_FOLDER}` is missing. "
            f"Restore it, or set slorb to false in {files.SPARSITY_CONFIG_NAME}."
        )
    return enabled
