"""What a saved model takes over from the one it was loaded from: configuration, generation settings, companions.

transformers rewrites a configuration in its own spelling, and Trainer changes it along the way (`use_cache`, special
tokens). The result should have the source's configuration with only the intended changes.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ast_sparse.errors import UserError, one_line
from ast_sparse.kernels.tf32 import tf32_kept
from ast_sparse.storage import files
from ast_sparse.storage.companions import (
    GENERATION_NAME,
    companion_files,
    copy_companions,
    is_chat_template,
    is_tokenizer_file,
    remove_tokenizer,
)

logger = logging.get_logger(__name__)

_CHANGED_BY_TRAINER = ("use_cache", "eos_token_id", "bos_token_id", "pad_token_id")
_ABSENT = object()
_OF_THE_WRITER = ("transformers_version", "_name_or_path", "torch_dtype")  # not settings of the model


# The object that holds a setting, its name, and its value.
Settings = Sequence[tuple[Any, str, Any]]


@dataclass(frozen=True)
class Origin:
    """The folder a model came from, and what it said when the model was loaded.

    Attributes:
        folder: the folder or the hub's cache, None if there is none (a model built from a configuration).
        raw: content of its config.json; empty without a folder.
        raw_generation: the bytes of its generation_config.json, if there is one.
        generation: that file as transformers reads it.
        config_class: class of the model's configuration.
    """

    folder: Path | None
    raw: dict[str, Any]
    raw_generation: bytes | None
    generation: GenerationConfig | None
    config_class: type[PreTrainedConfig]

    @classmethod
    def of(cls, model: PreTrainedModel, folder: Path | None = None) -> "Origin":
        """The origin of a model that has just been loaded.

        Args:
            folder: where it was loaded from; default: what its configuration says.

        Raises:
            UserError: generation_config.json there is damaged, or a file beside it is a link out of the folder.
        """
        folder = folder or source_folder(model.config)
        if folder is None:
            return cls(None, {}, None, None, type(model.config))
        companion_files(folder)
        generation = read_generation_config(folder)
        raw_generation = None if generation is None else (folder / GENERATION_NAME).read_bytes()
        raw = files.read_json(folder / files.CONFIG_NAME)
        return cls(folder, raw, raw_generation, generation, type(model.config))

    def complete(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Give a saved model what its source has: the spelling of config.json, generation_config.json, companions.

        Args:
            folder: what `save_pretrained` wrote.
            tokenizer: saved there too. If it was changed since it was loaded, the source's tokenizer files are not
                copied.
        """
        is_source = self.folder is not None and files.is_same(self.folder, folder)
        if tokenizer is not None and not is_source:
            remove_tokenizer(folder)
        written = set() if tokenizer is None else _save_tokenizer(tokenizer, folder)
        if self.raw:
            config = files.read_json(folder / files.CONFIG_NAME)
            files.write_json(folder / files.CONFIG_NAME, in_source_spelling(config, self.raw, self.config_class))
        saved = read_generation_config(folder)
        if self.raw_generation is not None and saved is not None and _values(saved) == _values(self.generation):
            (folder / GENERATION_NAME).write_bytes(self.raw_generation)
        if self.folder is None or is_source:
            return
        if not self.folder.is_dir():  # no reason to fail after hours of training
            logger.warning(f"{self.folder} is gone: files beside its weights (templates, licence) are not copied.")
            return
        same_tokens, same_templates = (True, True) if tokenizer is None else _is_as_in(tokenizer, self.folder)

        def wanted(path: Path) -> bool:
            same = same_templates if is_chat_template(path) else same_tokens or not is_tokenizer_file(path)
            return path not in written and same

        copy_companions(self.folder, folder, wanted)


@contextmanager
def settings_kept(model: PreTrainedModel, use_cache: bool | None = None) -> Iterator[Settings]:
    """Restore the settings of a model that Trainer changes: the cache, and the special tokens of its tokenizer.

    TF32, which Trainer may turn on for the whole process, is restored with them.

    Args:
        use_cache: set in the configuration meanwhile; None: leave it as it is.

    Yields:
        The settings from before.
    """
    holders = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    before = [(holder, name, getattr(holder, name, _ABSENT)) for holder in holders for name in _CHANGED_BY_TRAINER]
    if use_cache is not None:
        model.config.use_cache = use_cache
    try:
        with tf32_kept():
            yield before
    finally:
        _put(before)


@contextmanager
def saved_with(model: PreTrainedModel, settings: Settings) -> Iterator[None]:
    """Let a model be saved with other settings, in copies of its configurations, which saving may change."""
    live = model.config, getattr(model, "generation_config", None)
    now = [(holder, name, getattr(holder, name, _ABSENT)) for holder, name, _ in settings]
    _put(settings)
    model.config = copy.deepcopy(live[0])
    if live[1] is not None:  # a model that cannot generate has none
        model.generation_config = copy.deepcopy(live[1])
    _put(now)
    try:
        yield
    finally:
        model.config = live[0]
        if live[1] is not None:
            model.generation_config = live[1]


def _put(settings: Settings) -> None:
    for holder, name, value in settings:
        if value is not _ABSENT:
            setattr(holder, name, value)
        elif hasattr(holder, name):
            delattr(holder, name)


def in_source_spelling(
    config: dict[str, Any], raw: dict[str, Any], config_class: type[PreTrainedConfig]
) -> dict[str, Any]:
    """A configuration as transformers writes it, but with the source's keys where the meaning is the same.

    transformers renames keys, drops some, and adds defaults. What differs in meaning is taken from `config`.

    Args:
        config: what `save_pretrained` wrote.
        raw: the source's config.json.

    Returns:
        A configuration that reads as `config` does; `config` itself if no mixture of the two would.
    """
    before = _as_read(raw, config_class)
    if before is None or raw.get("model_type") != config.get("model_type"):
        return config
    mixed = _mixed(config, raw, before)
    after, wanted = _as_read(mixed, config_class), _as_read(config, config_class)
    if after is None or wanted is None or _stripped(after) != _stripped(wanted):
        return config
    return {key: mixed[key] for key in sorted(mixed)}


def _mixed(config: dict[str, Any], raw: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """`raw`, with what differs between `before` and `config`, also in nested dictionaries (`text_config`)."""
    mixed = {key: value for key, value in raw.items() if key not in ("torch_dtype", "_name_or_path")}
    for key in before.keys() | config.keys():
        values = config.get(key), raw.get(key), before.get(key)
        if key in _OF_THE_WRITER or (key in before and key in config and values[0] == values[2]):
            continue
        mixed.pop(key, None)
        if all(isinstance(value, dict) for value in values):
            mixed[key] = _mixed(*cast(Any, values))
        elif key in config:
            mixed[key] = values[0]
    if "dtype" in config:
        mixed["dtype"] = config["dtype"]
    return mixed


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation_config.json of a folder, None if there is none; values that contradict each other are kept.

    Raises:
        UserError: it is not a JSON object, or transformers cannot read a value.
    """
    path = folder / GENERATION_NAME
    if not path.is_file():
        return None
    files.read_json(path)  # what transformers would ignore is an error here
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # a value of the wrong kind can make it raise anything
        reason = one_line(error, 300, cut="marked", end="open")
        raise UserError(f"Cannot read `{path}`: {reason}. Correct the value, or remove the file.") from None


def check_saving(
    name: str,
    config: PreTrainedConfig,
    generation: GenerationConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Save everything but the weights into a temporary folder: what fails here would fail after hours of training.

    Args:
        name: of the model, for messages.

    Raises:
        UserError: names what cannot be saved, and why.
    """
    parts = {
        "configuration": (config, "Correct its config.json, or model.config"),
        "generation settings": (generation, "Correct model.generation_config"),
        "tokenizer": (tokenizer, "Use another tokenizer, or put its files into the folder of the model"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for what, (part, fix) in parts.items():
            try:
                if part is not None:
                    copy_of = part if what == "tokenizer" else copy.deepcopy(part)
                    copy_of.save_pretrained(folder)
            except Exception as error:  # the code of a model or a tokenizer can raise anything
                reason = one_line(error, 300, cut="marked", end="open")
                raise UserError(f"The {what} of {name!r} cannot be saved: {reason}. {fix}.") from error


def source_folder(config: PreTrainedConfig) -> Path | None:
    """The folder, or the folder in the hub's cache, that a configuration was loaded from; None if there is none."""
    name = str(getattr(config, "name_or_path", "") or "")
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(name, files.CONFIG_NAME, revision=hub_commit(config))
        except HFValidationError:  # a path that no longer exists
            return None
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder if (folder / files.CONFIG_NAME).is_file() else None


def hub_commit(config: PreTrainedConfig) -> str | None:
    """The commit that a configuration was loaded from, on the hub or in its cache; None for a local folder."""
    commit = getattr(config, "_commit_hash", None)
    return commit if isinstance(commit, str) else None


def _as_read(content: dict[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any] | None:
    """A config.json as transformers would write it again; None if its class cannot read it."""
    try:
        read = config_class.from_dict(copy.deepcopy(content))
        return cast(dict[str, Any], json.loads(read.to_json_string(use_diff=True)))
    except Exception:  # the code of a model can raise anything
        return None


def _stripped(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _OF_THE_WRITER}


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> set[Path]:
    """The files written, relative to the folder."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        shutil.copytree(name, folder, dirs_exist_ok=True)
        return {path.relative_to(name) for path in Path(name).rglob("*") if path.is_file()}


def _values(generation: GenerationConfig | None) -> dict[str, Any]:
    if generation is None:
        return {}
    ignored = ("transformers_version", "_from_model_config")
    return {key: value for key, value in generation.to_dict().items() if key not in ignored and value is not None}


def _is_as_in(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[bool, bool]:
    """Whether a tokenizer has the tokens, and the templates, of a folder, so that its other files still apply."""
    try:
        stored = type(tokenizer).from_pretrained(folder)
        vocabulary = stored.get_vocab() == tokenizer.get_vocab()
        same_tokens = vocabulary and stored.special_tokens_map == tokenizer.special_tokens_map
        return same_tokens, stored.chat_template == tokenizer.chat_template
    except Exception:  # there is none, or it needs code that may not be run
        return False, False
