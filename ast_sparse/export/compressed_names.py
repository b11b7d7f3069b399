"""Names of the compressed layers of a model, and what else bears them."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D


def linears_of(model: Any, compressed: frozenset[str]) -> dict[str, nn.Module]:
    """The layers of a model that are to be compressed, by their full names."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    return {name: layer for name, layer in linears.items() if short_name(name, model) in compressed}


def renames(conversion: Any, names: Iterable[str]) -> bool:
    """Whether a conversion is a renaming that changes one of the names."""
    trial = copy.copy(conversion)  # it remembers that it was used
    return isinstance(trial, WeightRenaming) and any(trial.rename_source_key(name)[0] != name for name in names)


def lacking_parts(model: Any, layers: Iterable[str], parts: tuple[str, ...], keys: Iterable[str]) -> dict[str, str]:
    """The layers of which a checkpoint has only some of the stored tensors, with the first that it lacks.

    transformers would fill them up with random values. Layers of which it has none are stored under other names.

    Args:
        parts: names of the stored tensors of a layer.
        keys: of the checkpoint.
    """
    stored, lacking = {short_name(key, model) for key in keys}, {}
    for name in layers:
        missing = [part for part in parts if f"{short_name(name, model)}.{part}" not in stored]
        if 0 < len(missing) < len(parts):
            lacking[name] = missing[0]
    return lacking


def twins_of(model: Any, compressed: frozenset[str]) -> dict[str, str]:
    """The layers that share the weight of a compressed one (shared blocks), with the name of that one."""
    ties = {key.removesuffix(".weight"): of.removesuffix(".weight") for key, of in model.all_tied_weights_keys.items()}
    return {name: of for name, of in ties.items() if short_name(of, model) in compressed}


def short_name(name: str, model: Any) -> str:
    """A module name without the prefix that only the model with a head has."""
    return name.removeprefix(f"{model.base_model_prefix}.")
