"""Read a causal LM without ever holding it whole in float32: each process reads its own rows, in the dtype it needs.

The model is built without values, split over the processes, and then filled. A checkpoint that transformers stores in
another form (fused experts, codes, `.gguf`) is read by the first process, which sends it tensor by tensor.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ast_sparse.distributed.pieces import local, pieces_as_whole, reshard, rows_of, whole
from ast_sparse.distributed.ranks import errors_shared, gather
from ast_sparse.errors import UserError
from ast_sparse.storage.finite import check_values
from ast_sparse.storage.frames import parameters_of, tensors_of
from ast_sparse.storage.source_files import Source, Stored
from ast_sparse.storage.tied import shared_names, untie_head

Shard = Callable[[PreTrainedModel], None]  # splits a model in place, whose parameters are on the meta device
_Piece = Callable[[str, Tensor], Tensor]  # this process's rows of a named tensor, given that tensor without values


def read_causal_lm(
    name_or_path: str | Path,
    shard: Shard | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    seed: int | None = None,
    untied: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """The model of `load_causal_lm` in float32, with the same values, read tensor by tensor.

    Args:
        shard: splits the model over the processes, all of which must call this; None: this process gets all of it.
        dtype: of the parameters; buffers keep their own. Default: float32.
        device: of what is not split; default: the CPU.
        seed: random weights from the configuration, as in `random_causal_lm`.
        untied: the output head gets a weight of its own if it shares the embedding's.
        options: `revision`, `gguf_file`, `attn_implementation`, `trust_remote_code` and `config_overrides`, as in
            `load_causal_lm`.

    Raises:
        UserError: as in `load_causal_lm`; in a sharded run it is raised on all processes.
    """
    source = Source(name_or_path, seed, options)
    together: Callable[[], AbstractContextManager[None]] = nullcontext if shard is None else errors_shared
    with together():
        stored = source.stored()
        if shard is not None and not all(gather(stored is not None)):
            stored = None  # one node could not download the files
        loads = stored is None and (shard is None or dist.get_rank() == 0)
        model = source.load(exact=shard is not None) if loads else source.frame
        for each in (model, source.frame) if untied else ():
            untie_head(each)
    if stored is None:
        return _cast(model, dtype, device) if shard is None else _sent(source, model, shard, dtype, device)
    cast(Any, model)._weight_conversions = []  # none was made, so saving undoes none, as after `load_causal_lm`
    if shard is not None:
        shard(model)
    with together():
        return fill(model, _from_files(model, stored, source.place.name), dtype, device, says=True)


def copied(
    model: PreTrainedModel,
    frame: PreTrainedModel,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Fill a frame with the values of a model tensor by tensor, so that there is no second copy in the model's dtype.

    Args:
        model: whole or sharded; not changed. All processes must call this if one of the two is sharded.
        frame: the same model without values.
        dtype, device: as in `read_causal_lm`.
    """
    reshard(model)  # a forward pass may have left weights gathered
    values = {name: value.detach() for name, value in tensors_of(model).items()}

    def piece(name: str, like: Tensor) -> Tensor:
        value = values[name]
        if isinstance(value, DTensor) and isinstance(like, DTensor) and value.placements == like.placements:
            return local(value)
        full = whole(value)
        return full[rows_of(like)] if like.dim() else full

    return fill(frame, piece, dtype, device or model.device)


@torch.no_grad()
def fill(
    model: PreTrainedModel,
    piece: _Piece,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    says: bool = False,
) -> PreTrainedModel:
    """Give a model on the meta device its values, in place, tensor by tensor; returns the model.

    Args:
        model: whole or sharded; its buffers that are not stored have their values.
        piece: returns this process's rows of a tensor, in any dtype; it is called once for tied ones.
        dtype: of the parameters; default: the dtype that the model has.
        device: of what is not split.
        says: show a bar, on the first process.
    """
    device = device or torch.device("cpu")
    parameters = parameters_of(model)
    made: dict[Tensor, nn.Parameter] = {}
    state: dict[str, Tensor] = {}
    items = tensors_of(model).items()
    shown: Any = items
    if says and not (dist.is_initialized() and dist.get_rank()):
        shown = logging.tqdm(items, desc="Loading weights")
    for name, live in shown:
        where = torch.device(live.device_mesh.device_type) if isinstance(live, DTensor) else device
        found = piece(name, live)
        value = found.to(where).to(live.dtype)
        if name in parameters:
            value = value.to(dtype or live.dtype)
        if value.untyped_storage().data_ptr() == found.untyped_storage().data_ptr():
            value = value.clone()  # of its own: not the pages of a file, or the memory of another model
        if name in parameters:
            value = pieces_as_whole(value, live) if isinstance(live, DTensor) else value
            made[live] = nn.Parameter(value, requires_grad=live.requires_grad)
        else:
            state[name] = value
    state |= {name: made[live] for name, live in parameters.items()}  # tied ones stay one parameter
    model.load_state_dict(state, strict=False, assign=True)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model


def _from_files(model: PreTrainedModel, stored: Stored, name: str) -> _Piece:
    """Pieces read from safetensors files."""
    parameters = parameters_of(model)
    other: dict[str, str] = {}  # tied tensors are stored under one of their names
    by_tensor: dict[Tensor, list[str]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        by_tensor.setdefault(value, []).append(key)
    for keys in by_tensor.values():
        other |= dict.fromkeys(keys, next((key for key in keys if key in stored), keys[0]))
    for key, twin in (pair, pair[::-1]) if (pair := shared_names(model)) is not None else ():
        if other[key] not in stored:  # untied here
            other[key] = other[twin]

    def piece(key: str, like: Tensor) -> Tensor:
        file, own = stored[other[key]]
        try:
            with safe_open(file, framework="pt") as tensors:  # opened anew, so that its pages do not add up
                if like.dim() == 0:
                    read = tensors.get_tensor(own)
                else:
                    rows = rows_of(like)
                    if rows.start < rows.stop:
                        read = tensors.get_slice(own)[rows]
                    else:  # fewer rows than processes
                        read = torch.empty((0, *like.shape[1:]), dtype=like.dtype)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"`{file}` is damaged: {error}. Copy or write the checkpoint again.") from error
        check_values(read, key, key in parameters, repr(name))
        return read

    return piece


def _sent(
    source: Source,
    model: PreTrainedModel,
    shard: Shard,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> PreTrainedModel:
    """The sharded model, whose values the first process sends tensor by tensor.

    Args:
        model: the loaded one on the first process; the frame on the others.
    """
    is_first = dist.get_rank() == 0
    values = {name: value.detach() for name, value in tensors_of(model).items()} if is_first else {}
    sent: dict[str, tuple[torch.dtype, torch.Size]] = gather({n: (v.dtype, v.shape) for n, v in values.items()})[0]
    conversions = gather(getattr(model, "_weight_conversions", None) if is_first else None)[0]
    frame = source.frame
    if {name: value.shape for name, value in tensors_of(frame).items()} != {n: s for n, (_, s) in sent.items()}:
        # layers that a configuration does not have (SLoRB of a teacher): every process loads the whole model
        with errors_shared():
            model = _cast(source.load(), dtype, None)
        shard(model)
        return model
    del model
    if conversions is not None:
        frame._weight_conversions = conversions
    shard(frame)

    def piece(name: str, like: Tensor) -> Tensor:
        where = torch.device(like.device_mesh.device_type) if isinstance(like, DTensor) else device
        value = (
            values.pop(name).to(where) if is_first else torch.empty(sent[name][1], dtype=sent[name][0], device=where)
        )
        if isinstance(like, DTensor):
            return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=0).to_local()
        dist.broadcast(value.view(torch.uint8) if value.dtype == torch.bool else value, 0)
        return value

    return fill(frame, piece, dtype, device, says=True)


def _cast(model: PreTrainedModel, dtype: torch.dtype | None, device: torch.device | None) -> PreTrainedModel:
    """Cast the parameters of a model one after the other, in place; buffers keep their dtype."""
    for parameter in model.parameters() if dtype is not None else ():
        parameter.data = parameter.data.to(dtype)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model
