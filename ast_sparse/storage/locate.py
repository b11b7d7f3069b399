"""Where a model is (hub, local folder, `.gguf` file), and what can be read from it without its weights.

Separate from `load` because the model classes take seconds to import.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ast_sparse.errors import UserError, did_you_mean, one_line, shown, shown_name
from ast_sparse.storage import files
from ast_sparse.storage.model_kind import check_direction, is_causal

_UNTRUSTED = "trust_remote_code=True"  # part of transformers' message about code that it was not allowed to run
_COUNTS = re.compile("(layers?|experts|labels)$")  # integers of config.json that loops run over ...
_LARGEST_COUNT = 2**16  # ... of the largest model
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})/")  # of a commit, in the hub's cache


@dataclass(frozen=True)
class Place:
    """Where a model is. `folder` is None for a model on the hub."""

    name: str
    gguf_file: str | None
    folder: Path | None

    @classmethod
    def find(cls, name_or_path: str | Path, gguf_file: str | None) -> "Place":
        path = Path(name_or_path).expanduser()
        if gguf_file is None and path.suffix == ".gguf":
            path, gguf_file = path.parent, path.name
            if not (path / gguf_file).is_file():
                raise UserError(f"There is no file `{name_or_path}`. Check the path.")
        if path.is_dir():
            if gguf_file is None:
                files.require_model_folder(path)
            elif not (path / gguf_file).is_file():
                raise UserError(f"`{path}` holds no file `{gguf_file}`. Check `gguf_file`.")
            return cls(str(path), gguf_file, path)
        if path.exists():
            raise UserError(
                f"`{name_or_path}` is a file, but not a .gguf file. Give a folder, a .gguf file or a hub id."
            )
        name = str(name_or_path)
        beside = path.parent != Path() and path.parent.is_dir()  # `out/export` could be a hub id if there were no `out`
        if beside or not _HUB_ID.fullmatch(name) or name.startswith("."):
            raise UserError(f"There is no folder `{name}`, and it is not a hub id. Check the path.")
        return cls(name, gguf_file, None)

    @property
    def model_folder(self) -> Path | None:
        """The local folder of an ordinary model, None for the hub and for a .gguf."""
        return self.folder if self.gguf_file is None else None

    def arguments(self, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
        arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        if revision is not None and self.folder is None:
            arguments["revision"] = revision
        return arguments


def load_model_config(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """Load the configuration of a model without its weights; `origin.hub_commit` knows which commit it is from.

    Raises:
        UserError: the configuration is missing or damaged, is not that of a causal LM, or an override names a key that
            it does not have.
    """
    place = Place.find(name_or_path, gguf_file)
    if place.model_folder is not None:
        _check_counts(files.read_json(place.model_folder / files.CONFIG_NAME), place.name)
    with named_errors("configuration", place), quiet_transformers():
        config = AutoConfig.from_pretrained(place.name, **place.arguments(revision, trust_remote_code))
        if (commit := _commit_in_cache(place, revision)) is not None:
            config._commit_hash = commit  # where older versions of transformers keep it
    for key, value in (config_overrides or {}).items():
        if not hasattr(config, key):
            near = did_you_mean(key, config.to_dict(), quoted="`{}`".format)
            hint = near or f"See the model's {files.CONFIG_NAME} for the names."
            raise UserError(f"model.config_overrides: {type(config).__name__} has no `{key}`. {hint}")
        try:
            setattr(config, key, value)
        except StrictDataclassError as error:
            reason = one_line(error, 300, cut="word", end="mark")
            raise UserError(f"model.config_overrides: {reason} Give a value of that kind.") from None
    if not is_causal(config):
        raise UserError(
            f"`{place.name}` is a {type(config).__name__}, which AutoModelForCausalLM does not load. Use a "
            "decoder-only language model."
        )
    check_direction(config, place.name)
    return config


def _commit_in_cache(place: Place, revision: str | None) -> str | None:
    """The commit that a configuration has just been loaded from; None for a local model."""
    if place.folder is not None:
        return None
    cached = try_to_load_from_cache(place.name, place.gguf_file or files.CONFIG_NAME, revision=revision)
    found = _SNAPSHOT.search(Path(cached).as_posix()) if isinstance(cached, str) else None
    return None if found is None else found[1]


def _check_counts(config: dict[str, Any], name: str) -> None:
    """Raise UserError if a count in config.json would keep transformers busy forever."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, name)
        elif isinstance(value, int) and _COUNTS.search(key) and abs(value) > _LARGEST_COUNT:
            where = f"`{name}/{files.CONFIG_NAME}`: {shown_name(key)}"
            raise UserError(f"{where}={shown(value)} is too large. Restore the file.")


def load_tokenizer(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, from the same places as the model.

    Raises:
        UserError: there is none, or it is damaged.
    """
    place = Place.find(name_or_path, gguf_file)
    # Given a folder without tokenizer files, transformers may invent an empty tokenizer.
    if place.model_folder and not files.tokenizer_files(place.model_folder):
        raise UserError(
            f"`{place.name}` holds no tokenizer. Copy the tokenizer files of the original model into the folder."
        )
    with named_errors("tokenizer", place):
        return AutoTokenizer.from_pretrained(place.name, **place.arguments(revision, trust_remote_code))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the messages of transformers, except errors."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def named_errors(what: str, place: Place) -> Iterator[None]:
    """Turn the errors of transformers, often many lines long, into one line that names the model."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        fix = "Install it: pip install 'ast-sparse[gguf]'." if place.gguf_file else "Install the package."
        reason = one_line(error, 300, cut="word", end="mark")
        raise UserError(f"Cannot load the {what} of `{place.name}`: {reason} {fix}") from error
    except Exception as error:
        if _UNTRUSTED in str(error):
            raise UserError(
                f"The {what} of `{place.name}` needs code that comes with it. Read that code, then allow it: "
                "--trust-remote-code, or model.trust_remote_code: true."
            ) from error
        where = f"{place.name}/{place.gguf_file}" if place.gguf_file else place.name
        fix = "Check the files in the folder." if place.folder else "Check the hub id, or give a local folder."
        reason = one_line(error, 300, cut="word", end="mark")
        raise UserError(f"Cannot load the {what} of `{where}`: {reason} {fix}") from error
