"""The dtype of each tensor of a model loaded in a given dtype: transformers keeps some of them in float32."""

import copy
import warnings
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from ast_sparse.storage import files
from ast_sparse.storage.sharded import is_sharded_checkpoint

_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # dtypes of config.json as the files spell them


def loaded_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that `from_pretrained(dtype=…)` gives every parameter and stored buffer of a model, by name.

    For example, the router correction biases of DeepSeek-V3 are kept in float32 (`_keep_in_fp32_modules_strict`), and
    a tensor that its class creates in a fixed dtype stays in it.
    """
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        frame = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    plan = frame._get_dtype_plan(dtype)
    search = build_glob_alternation(list(plan))[0].search if plan else None  # as the loader does
    return {
        name: torch.float32 if search is not None and search(name) else tensor.dtype
        for name, tensor in frame.state_dict().items()
    }


def reading_dtype(folder: Path) -> torch.dtype | Literal["auto"]:
    """A dtype that rounds no weight of a folder: the one in config.json if all weights are stored in it."""
    if is_sharded_checkpoint(folder):
        return "auto"
    config = files.read_json(folder / files.CONFIG_NAME)
    named = config.get("dtype", config.get("torch_dtype"))
    stored = {dtype for file in files.weight_files(folder) for dtype, _ in files.tensor_shapes(file).values()}
    floats = {dtype for dtype in stored if dtype.startswith(("F", "BF"))}
    return "auto" if floats == {_SAFETENSORS.get(str(named))} else torch.float32
