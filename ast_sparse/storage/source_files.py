"""Where the tensors of a model are on disk, and whether rows of them can be read as they are."""

import copy
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedConfig, PreTrainedModel

from ast_sparse.storage import files
from ast_sparse.storage.checksums import check_checksums
from ast_sparse.storage.dtypes import reading_dtype
from ast_sparse.storage.frames import frame_of_config
from ast_sparse.storage.load import check_files, load_causal_lm, random_causal_lm, take_generation_config, warn_unused
from ast_sparse.storage.locate import Place, load_model_config, named_errors, quiet_transformers
from ast_sparse.storage.origin import hub_commit
from ast_sparse.storage.packed import check_leftovers, decode_on_load, moves_only, plain_names
from ast_sparse.storage.quantized import forget_quantization
from ast_sparse.storage.sharded import is_sharded_checkpoint
from ast_sparse.storage.slorb_adapter import adapter_home

Stored = dict[str, tuple[Path, str]]  # file and key by the name of a tensor in the model
_FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors spells them
# what old checkpoints hold and models compute
_COMPUTED = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}


@dataclass
class Source:
    """A checkpoint, or a configuration for random weights.

    Args:
        name_or_path: as in `load_causal_lm`.
        seed: of random weights; None: the weights are read.
        options: other arguments of `load_causal_lm`, without `dtype`.
    """

    name_or_path: str | Path
    seed: int | None
    options: dict[str, Any]

    @cached_property
    def place(self) -> Place:
        """Where it is."""
        return Place.find(self.name_or_path, self.options.get("gguf_file"))

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration, with the settings that decode while loading."""
        keys = ("revision", "gguf_file", "trust_remote_code", "config_overrides")
        config = load_model_config(self.name_or_path, **{k: v for k, v in self.options.items() if k in keys})
        if self.seed is None:
            decode_on_load(config, self.place.name)
        return config

    @cached_property
    def frame(self) -> PreTrainedModel:
        """The model without values."""
        config = copy.deepcopy(self.config)
        forget_quantization(config)
        with named_errors("model", self.place), quiet_transformers():
            frame: PreTrainedModel = frame_of_config(config, self.options.get("attn_implementation"), self._is_trusted)
        take_generation_config(frame)
        return frame

    @property
    def _is_trusted(self) -> bool:
        return bool(self.options.get("trust_remote_code"))

    def stored(self) -> Stored | None:
        """File and key of every tensor of the model, tied ones once; None if rows cannot be read as they are.

        `load` reads those others, and raises the errors of a checkpoint that does not fit.
        """
        folder = self._folder()
        is_code = getattr(self.config, "auto_map", None) is not None  # it may load in a way of its own
        if folder is None or is_code or is_sharded_checkpoint(folder):
            return None
        weights = files.weight_files(folder)
        headers = {file: files.tensor_shapes(file) for file in weights}
        shapes = {key: value for header in headers.values() for key, value in header.items()}
        is_coded = getattr(self.config, "quantization_config", None) is not None
        if is_coded or files.sparse_keys(shapes)[0] or self._has_adapter():
            return None
        if self.place.folder is not None:
            check_checksums(folder, weights)
            check_files(folder, self.place, self.config, {"trust_remote_code": self._is_trusted})
        names = plain_names(shapes, self.frame)
        if names is None or not _fits(self.frame, {name: shapes[key] for key, name in names.items()}):
            return None
        unused = sorted(key for key in shapes if key not in names and not _is_ignored(self.frame, key))
        if unused and self.place.folder is None:
            check_leftovers(unused, self.frame, self.place.name)
        warn_unused(unused, self.place.name)
        return {names[key]: (file, key) for file, header in headers.items() for key in header if key in names}

    def _folder(self) -> Path | None:
        """The folder of the weights, which are downloaded; None if they are not safetensors, or not wanted."""
        if self.seed is not None or self.place.gguf_file is not None:
            return None
        if self.place.folder is not None:
            return self.place.folder
        revision = self.options.get("revision")
        try:
            return Path(hf_hub_download(self.place.name, files.WEIGHTS_NAME, revision=revision)).parent
        except EntryNotFoundError:  # several files, or pickled ones
            pass
        except Exception:  # `load` says what is wrong with the name, the revision or the connection
            return None
        try:
            index = Path(hf_hub_download(self.place.name, files.INDEX_NAME, revision=revision))
            for name in sorted(set(files.read_json(index)["weight_map"].values())):
                hf_hub_download(self.place.name, name, revision=revision)
        except Exception:
            return None
        return index.parent

    def load(self, exact: bool = False) -> PreTrainedModel:
        """The whole model in float32.

        Args:
            exact: it may be in the dtype of the files instead, if no value differs.
        """
        if self.seed is not None:
            return random_causal_lm(self.name_or_path, self.seed, **self.options)
        dtype = self._exact_dtype() if exact else torch.float32
        return load_causal_lm(self.name_or_path, dtype=dtype, **self.options)

    def _exact_dtype(self) -> torch.dtype | Literal["auto"]:
        folder = self.place.model_folder
        if folder is None or is_sharded_checkpoint(folder):
            return torch.float32
        stored = {name for file in files.weight_files(folder) for name in files.tensor_shapes(file)}
        is_coded = getattr(self.config, "quantization_config", None) is not None
        if is_coded or files.sparse_keys(stored)[0] or self._has_adapter() or not moves_only(self.frame):
            return torch.float32
        return reading_dtype(folder)

    def _has_adapter(self) -> bool:
        """Whether a model without masks has a SLoRB adapter; that of one with masks is in its weights."""
        return adapter_home(self.place, hub_commit(self.config) or self.options.get("revision")) is not None


def _fits(frame: PreTrainedModel, shapes: dict[str, tuple[str, list[int]]]) -> bool:
    """Whether the stored tensors are those of the model: all of them, each once, of its shape, in floating point."""
    groups: dict[Any, list[str]] = {}
    for name, value in frame.state_dict(keep_vars=True).items():
        groups.setdefault(value, []).append(name)
    for value, names in groups.items():
        held = [name for name in names if name in shapes]
        if len(held) != 1:  # tied tensors that are stored twice may differ
            return False
        dtype, shape = shapes[held[0]]
        if list(value.shape) != shape or value.is_floating_point() != (dtype in _FLOATS):
            return False
    return True


def _is_ignored(frame: Any, key: str) -> bool:
    """Whether transformers leaves a stored tensor out without a word."""
    patterns = set(frame._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in frame.named_buffers()]
    patterns |= {found for end, found in _COMPUTED.items() if any(name.endswith(end) for name in buffers)}
    return any(re.search(pattern, key) for pattern in patterns)
