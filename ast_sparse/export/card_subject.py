"""What a model card is about: the record of the export, its base model, and how names and settings are shown in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ast_sparse.config.yaml12 import read_yaml
from ast_sparse.errors import UserError
from ast_sparse.storage import files
from ast_sparse.storage.base_card import is_hub_id
from ast_sparse.storage.origin import hub_commit
from ast_sparse.storage.run_folder import RESOLVED_CONFIG, is_run
from ast_sparse.storage.sparsity_record import SparsityRecord
from ast_sparse.storage.stage_results import PROTOCOL, read_stages

logger = logging.get_logger(__name__)

_SECRETS = ("token", "hub_token", "push_to_hub_token", "storage_options")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a card is about.

    Attributes:
        record: of the export, with the run's configuration and results if there was a run.
        folder: what was exported, as the user named it; None for a model object.
        origin: the folder whose companions the export has; None if there is none.
        name: `name_or_path` of the model's configuration, or what kind of model it is.
        commit: on the hub, of a model object.
        has_conv1d: some pruned layers are GPT-2's.
        model_type: of the model's configuration.
        ranks: of SLoRB by layer.
        repo_id: where the export will be on the hub, if that is known.
    """

    record: SparsityRecord
    folder: Path | None
    origin: Path | None
    name: str
    commit: str | None
    has_conv1d: bool
    model_type: str
    ranks: Mapping[str, int]
    repo_id: str | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        record: SparsityRecord,
        folder: Path | None,
        origin: Path | None,
        pruned: Mapping[str, int],
        slorb: files.SlorbPairs,
        repo_id: str | None,
    ) -> "Subject":
        """The subject of a card; `pruned` has the `group_dim` of each pruned layer."""
        return cls(
            record=record,
            folder=folder,
            origin=origin,
            name=str(model.config.name_or_path or f"{model.config.model_type} model"),
            commit=hub_commit(model.config),
            has_conv1d=0 in pruned.values(),
            model_type=str(model.config.model_type),
            ranks={name: int(x.shape[0]) for name, (_, x) in slorb.items()},
            repo_id=repo_id,
        )

    @property
    def base(self) -> str | None:
        """Name of the model that was made sparse, as a card shows it."""
        file = self.record.get("run", "config", "model", "gguf_file")
        name = file or self.record.get("run", "config", "model", "name_or_path") or self.record.get("base_model")
        return shareable(str(name)) if name else None

    @property
    def is_random(self) -> bool:
        """Whether training began with random weights, so that only the architecture is that of the base model."""
        return self.record.get("run", "config", "model", "random_weights") is True

    @property
    def base_id(self) -> str | None:
        """Hub id of the base model; None for a local one, whose name may look like an id."""
        if self.is_random:
            return None
        base, commit = self.record.get("base_model"), self.record.get("base_commit")
        if base is None and self.folder is None:
            base, commit = self.name, self.commit
        return str(base) if commit is not None and is_hub_id(str(base)) else None

    @property
    def title(self) -> str:
        """The shortest name for the model."""
        name = self.base or (self.folder.resolve().name if self.folder else self.name)
        return Path(name).name.removesuffix(".gguf") or "A model"


def with_run(record: SparsityRecord, folder: Path) -> SparsityRecord:
    """The record of a folder, and, if it is the output of `ast-train`, the run's configuration and results."""
    if not is_run(folder):
        return record
    try:
        config, stages = read_yaml(folder / RESOLVED_CONFIG), read_stages(folder)
    except UserError as error:
        logger.warning(f"{error} The model card will not have the results of the run.")
        return record
    names: dict[str, str] = {}  # of data sets, as they are shown
    for name in dict.fromkeys(name for of in stages.values() for name in of):
        same = [other for other in names if shareable(other) == shareable(name)]
        names[name] = f"{shareable(name)} ({len(same) + 1})" if same else shareable(name)
    results = {
        stage: {names[name]: {key: result.get(key) for key in ("perplexity", *PROTOCOL)} for name, result in of.items()}
        for stage, of in stages.items()
    }
    if isinstance(config.get("evaluation"), dict):
        config["evaluation"].pop("prompts", None)
    return record.with_run(shareable_values(config), results)


def shareable(name: str) -> str:
    """The name of a folder or file as strangers may see it: a relative path as it is, of any other the last part."""
    path = Path(name)
    private = path.is_absolute() or name.startswith("~") or ".." in path.parts
    return path.name if private else name


def shareable_values(value: Any) -> Any:
    """Settings with `shareable` paths, and without passwords."""
    if isinstance(value, Mapping):
        return {key: shareable_values(each) for key, each in value.items() if key not in _SECRETS}
    if isinstance(value, list | tuple):
        return [shareable_values(each) for each in value]
    return shareable(value) if isinstance(value, str) else value
