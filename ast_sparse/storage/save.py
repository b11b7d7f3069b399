"""Write a sparse model as an ordinary Hugging Face checkpoint, and move finished folders into place."""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from ast_sparse.errors import UserError, one_line
from ast_sparse.storage import files
from ast_sparse.storage.checksums import remove_checksums, write_checksums
from ast_sparse.storage.quantized import plain_conversions
from ast_sparse.storage.slorb_adapter import common_group_dim, write_adapter


def split_state_dict(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], files.SlorbPairs]:
    """Split the raw state dict of a model with sparse layers.

    Args:
        state_dict: of the model itself, or gathered from the ranks of a sharded one; not changed.

    Returns:
        The state dict of the plain model with masked weights (pruned entries exactly 0.0), the masks and the SLoRB
        pairs by layer name. For a plain model: its state dict and nothing else.
    """
    masked, adapted = files.sparse_keys(state_dict)
    weights = {name: value.detach() for name, value in state_dict.items() if not files.is_sparse_key(name, masked)}
    masks = {layer: state_dict[f"{layer}.mask"].detach() for layer in sorted(masked)}
    for layer, mask in masks.items():
        weights[f"{layer}.weight"] = torch.where(mask, weights[f"{layer}.weight"], 0)
    pairs = {
        layer: (state_dict[f"{layer}.slorb.S"].detach(), state_dict[f"{layer}.slorb.X"].detach())
        for layer in sorted(adapted)
    }
    return weights, masks, pairs


def save_sparse_model(
    model: PreTrainedModel,
    out_dir: str | Path,
    config: dict[str, Any],
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model with sparse layers as an ordinary checkpoint, in its own dtype; the model is not changed.

    Args:
        model: with `SparseLinear` or `SparseConv1D` layers.
        out_dir: gets the masked weights and the model's configuration, `slorb/` (a PEFT adapter) if the model has
            SLoRB, and `sparsity_config.json`. Other files there are left alone.
        config: content of `sparsity_config.json`.
        state_dict: the full raw state dict, if the model's own is sharded.
    """
    folder = Path(out_dir)
    weights, _, pairs = split_state_dict(model.state_dict() if state_dict is None else state_dict)
    save_weights(model, folder, weights)
    write_sparsity(model, out_dir, pairs, config)


def write_sparsity(
    model: PreTrainedModel, out_dir: str | Path, pairs: files.SlorbPairs, config: dict[str, Any]
) -> None:
    """Write what a sparse model has beside its weights: SLoRB and `sparsity_config.json`; as `save_sparse_model`."""
    folder = Path(out_dir)
    adapter = folder / files.ADAPTER_FOLDER
    if pairs:
        write_adapter(adapter, str(out_dir), pairs, common_group_dim(model, pairs))
    elif (adapter / "adapter_config.json").is_file():
        shutil.rmtree(adapter)  # of an earlier run: it would be taken for this model's
    files.write_json(folder / files.SPARSITY_CONFIG_NAME, config)


def save_weights(
    model: PreTrainedModel, folder: Path, weights: dict[str, Tensor], original_format: bool = True
) -> None:
    """`save_pretrained` with the given weights, and their checksums; the model's configuration stays as it was.

    Args:
        weights: state dict of the plain model; a tied tensor may appear under each of its names.
        original_format: undo the conversions transformers made when it loaded the model (fused experts, renamings).
    """
    weights = dict(weights)
    for name, kept in getattr(model, "all_tied_weights_keys", {}).items():
        if name in weights and kept in weights:
            del weights[name]
    write_plain(model, folder, weights, original_format)
    write_checksums(folder)


def write_plain(model: PreTrainedModel, folder: Path, weights: dict[str, Tensor], original_format: bool = True) -> None:
    """As `save_weights`, with tied tensors once, and without checksums."""
    remove_checksums(folder)
    with saved_plain(model):
        model.save_pretrained(folder, state_dict=weights, save_original_format=original_format)


@contextmanager
def saved_plain(model: PreTrainedModel) -> Iterator[None]:
    """Inside, saving undoes the conversions of plain weights alone; afterwards the configuration is as before."""
    before = model.config.dtype, model.config.architectures
    conversions: Any = getattr(model, "_weight_conversions", None)
    try:
        cast(Any, model)._weight_conversions = plain_conversions(model)
        yield
    finally:
        model.config.dtype, model.config.architectures = before
        cast(Any, model)._weight_conversions = conversions


def check_out_dir(out_dir: Path, source: Path | None, overwrite: bool) -> None:
    """Raise UserError unless the folder is free, or may be overwritten without losing anything but a model.

    `finished_folder` must also be able to write beside it, and to give a folder its name.

    Args:
        out_dir, source: resolved paths; source is the folder that is exported, if any.
    """
    if source is not None and any(files.is_same(out_dir, folder) for folder in (source, *source.parents)):
        raise UserError(f"`{out_dir}` holds the checkpoint that is being exported. Choose another output folder.")
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"`{out_dir}` is a file. Choose another output folder.")
    if os.path.ismount(out_dir):
        raise UserError(f"`{out_dir}` is a mount point, which no other folder can replace. Name a folder inside it.")
    above = next(parent for parent in out_dir.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(
            f"`{out_dir}` cannot be written: it is made in `{above}`, which cannot be written to. Choose another "
            "output folder."
        )
    if not out_dir.is_dir() or not any(out_dir.iterdir()):
        return
    if not overwrite:
        raise UserError(f"`{out_dir}` exists and is not empty. Choose another folder, or overwrite it (--overwrite).")
    if not (out_dir / files.CONFIG_NAME).is_file():
        raise UserError(
            f"`{out_dir}` holds something other than a model, so it is not overwritten. Choose another folder."
        )


@contextmanager
def finished_folder(out_dir: Path) -> Iterator[Path]:
    """A temporary folder beside `out_dir` that takes its place if the block succeeds, and is removed if it does not.

    Raises:
        UserError: writing failed (no space, no permission).
    """
    tag = secrets.token_hex(4)
    partial = out_dir.with_name(f".{out_dir.name}.partial-{tag}")
    replaced = out_dir.with_name(f".{out_dir.name}.replaced-{tag}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if out_dir.is_dir():
            out_dir.rename(replaced)
        partial.rename(out_dir)
    except BaseException as error:
        if replaced.is_dir() and not out_dir.exists():
            replaced.rename(out_dir)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            reason = one_line(error, end="open")
            raise UserError(
                f"Cannot write `{out_dir}`: {reason}. Check the space and the permissions there."
            ) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)
