"""How many replicas a sharded run has, and over how many processes each is split: `training.parallelism_config`."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import ParallelismConfig
from transformers import TrainingArguments

from ast_sparse.errors import UserError, did_you_mean, one_line, shown, shown_name

_SIZES = ("dp_replicate_size", "dp_shard_size")
_OTHERS = ("tp_size", "cp_size", "sp_size")
_USED = "ACCELERATE_USE_PARALLELISM_CONFIG"
_FIELD = "training.parallelism_config"


def parallelism_config(given: Any) -> ParallelismConfig | None:
    """The value of `training.parallelism_config`, which YAML writes as a mapping of sizes.

    Raises:
        UserError: a name is unknown, or a size is not a whole number above 0.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"{_FIELD}={shown(given)} is not a mapping. Write {{dp_replicate_size: 2, dp_shard_size: 4}}.")
    known = [item.name for item in dataclasses.fields(ParallelismConfig)]
    for name, value in given.items():
        if name not in known:
            hint = did_you_mean(name, _SIZES) or f"Set {' and '.join(_SIZES)}."
            raise UserError(f"{_FIELD}: there is no {shown_name(name)}. {hint}")
        if name.endswith("_size") and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{_FIELD}.{name}={shown(value)} must be a whole number above 0.")
    try:
        return ParallelismConfig(**given)
    except (ValueError, TypeError) as error:  # of combinations that are refused below in any case
        raise UserError(f"{_FIELD}={shown(dict(given))}: {one_line(error, end='open')}. Correct it.") from None


def replicas_and_shards(args: TrainingArguments) -> tuple[int, int] | None:
    """The sizes that a run asks for, from `args` or from `accelerate launch`; None if it asks for none.

    Raises:
        UserError: a size is asked for that masks cannot follow.
    """
    config, where = args.parallelism_config, _FIELD
    if not isinstance(config, ParallelismConfig | None):
        raise UserError(f"{_FIELD}={shown(config)}: give an accelerate.ParallelismConfig.")
    if config is None and os.environ.get(_USED, "").lower() == "true":
        config, where = ParallelismConfig(), "parallelism_config of `accelerate launch`"
    if config is None:
        return None
    for name in _OTHERS:
        if getattr(config, name) != 1:
            raise UserError(
                f"{where}: {name}={getattr(config, name)}: tensor, context and sequence parallelism cut the groups of "
                f"a mask or a block. Remove it; set {' and '.join(_SIZES)}."
            )
    return config.dp_replicate_size, config.dp_shard_size


def check_parallelism(args: TrainingArguments, is_sharded: bool) -> None:
    """Raise UserError if the replicas and their parts do not fit the other settings.

    Args:
        is_sharded: FSDP2 is on.
    """
    sizes = replicas_and_shards(args)
    if sizes is None or sizes == (1, 1):
        return
    said = " and ".join(f"{name}={size}" for name, size in zip(_SIZES, sizes, strict=True))
    if not is_sharded:
        raise UserError(f"{_FIELD}: {said} would be ignored without FSDP2. Set fsdp: true, or remove it.")
    if sizes[1] == 1:
        raise UserError(f"{_FIELD}: {said}: nothing is sharded. Remove it and training.fsdp; DDP (torchrun) does this.")


def grid_of(args: TrainingArguments, processes: int | None = None) -> tuple[int, int]:
    """Replicas and processes of each in a sharded run; by default one replica over all processes.

    Args:
        processes: of the run; default: those that the launcher has started.

    Raises:
        UserError: their product is not the number of processes.
    """
    sizes, processes = replicas_and_shards(args), processes or args.world_size
    if sizes is None or sizes == (1, 1):
        return 1, processes
    replicas, shards = sizes
    if replicas * shards != processes:
        fits = f"Set {_SIZES[0]}: {processes // shards}" if processes % shards == 0 else "Change one"
        raise UserError(
            f"{_FIELD}: {_SIZES[0]}={replicas} x {_SIZES[1]}={shards} is not the number of processes, "
            f"{processes}. {fits}, or start {replicas * shards} processes."
        )
    return replicas, shards


@contextmanager
def hidden_from_accelerate(args: TrainingArguments) -> Iterator[None]:
    """Inside, accelerate makes no grid of processes: between CPU processes it refuses to, and a run makes its own."""
    config, args.parallelism_config = args.parallelism_config, None
    used = os.environ.pop(_USED, None)
    try:
        yield
    finally:
        args.parallelism_config = config
        if used is not None:
            os.environ[_USED] = used
