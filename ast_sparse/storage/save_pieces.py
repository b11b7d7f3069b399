"""Write a sharded model as the ordinary checkpoint of the whole one: no process holds more than one file of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ast_sparse.distributed.pieces import local, pieces_as_whole, reshard, unwrapped_name, whole
from ast_sparse.distributed.ranks import gather, own_rank
from ast_sparse.errors import SharedError, UserError, one_line
from ast_sparse.progress import library_bars
from ast_sparse.storage import files
from ast_sparse.storage.checksums import write_checksums
from ast_sparse.storage.save import saved_plain, write_plain, write_sparsity

FILE_BYTES = 4 * 10**9  # of a weight file at most, unless a tensor is larger


@dataclass(frozen=True)
class Piece:
    """A weight of the plain model, and the mask of its layer, or None; both may be sharded.

    The value is that of the sparse layer, before it is masked.
    """

    value: Tensor
    mask: Tensor | None

    def rows(self) -> Tensor:
        """This process's rows of the masked weight; pruned entries are exactly 0.0."""
        rows = local(self.value).detach()
        return rows if self.mask is None else torch.where(local(self.mask), rows, 0)

    def gathered(self) -> Tensor:
        """The whole masked weight, on every process; all must call this."""
        rows = self.rows()
        return whole(pieces_as_whole(rows, self.value)) if isinstance(self.value, DTensor) else rows

    def meta(self) -> Tensor:
        """Its shape and dtype."""
        return torch.empty(self.value.shape, dtype=self.value.dtype, device="meta")


def plain_pieces(model: nn.Module) -> tuple[dict[str, Piece], dict[str, tuple[Piece, Piece]]]:
    """The weights of the plain model and the SLoRB pairs by layer, as in `split_state_dict`, of a sharded model."""
    reshard(model)
    state = {unwrapped_name(name): value for name, value in model.state_dict().items()}
    masked, adapted = files.sparse_keys(state)
    weights = {}
    for name, value in state.items():
        if not files.is_sparse_key(name, masked):
            layer = name.removesuffix(".weight")
            mask = state[f"{layer}.mask"] if layer in masked and name.endswith(".weight") else None
            weights[name] = Piece(value, mask)
    pairs = {
        layer: (Piece(state[f"{layer}.slorb.S"], None), Piece(state[f"{layer}.slorb.X"], None))
        for layer in sorted(adapted)
    }
    return weights, pairs


def stored_pieces(pieces: dict[str, Piece], frame: PreTrainedModel) -> dict[str, Piece] | None:
    """The weights by the names they are stored under, tied ones once; None if transformers stores others.

    Args:
        frame: the model before it was sharded, without values.
    """
    tied = getattr(frame, "all_tied_weights_keys", None) or {}
    ignored = set(getattr(frame, "_keys_to_ignore_on_save", None) or ())
    stored = {
        name: piece
        for name, piece in pieces.items()
        if name not in ignored and not (name in tied and tied[name] in pieces)
    }
    meta = {name: piece.meta() for name, piece in stored.items()}
    with saved_plain(frame):
        converted: dict[str, Tensor] = revert_weight_conversion(frame, dict(meta))
    if converted.keys() != meta.keys() or any(converted[name] is not meta[name] for name in meta):
        return None
    return stored if len({id(piece.value) for piece in stored.values()}) == len(stored) else None


@torch.no_grad()
def save_pieces(
    model: nn.Module,
    frame: PreTrainedModel,
    out_dir: str | Path,
    config: dict[str, Any],
    file_bytes: int = FILE_BYTES,
) -> bool:
    """Write a model that FSDP2 has sharded as `save_sparse_model` writes a whole one; all processes must call this.

    The first process holds a file of weights at a time in CPU memory, and at the end all SLoRB pairs; a device holds
    one whole weight.

    Args:
        frame: as in `stored_pieces`, with the settings that are saved; not changed.
        config: as in `save_sparse_model`.
        file_bytes: of one file at most.

    Returns:
        False, and nothing is written, if transformers stores the model in another form (fused experts).

    Raises:
        OSError, SafetensorError: a file cannot be written; on the other processes a SharedError.
    """
    folder = Path(out_dir)
    pieces, pairs = plain_pieces(model)
    stored = stored_pieces(pieces, frame)
    if stored is None:
        return False
    names = {name: piece.meta() for name, piece in stored.items()}
    split = split_torch_state_dict_into_shards(
        names, filename_pattern="model{suffix}.safetensors", max_shard_size=file_bytes
    )
    writes = own_rank()[0] == 0
    _on_first(lambda: _begin(frame, folder))
    for file, inside in split.filename_to_tensors.items():
        tensors: dict[str, Tensor] = {}
        for name in inside:
            tensor = stored[name].gathered()
            if writes:
                tensors[name] = tensor.cpu().contiguous()
            del tensor
        _on_first(partial(save_file, tensors, folder / file, metadata={"format": "pt"}))
    whole_pairs: files.SlorbPairs = {}
    for layer, pair in pairs.items():
        s, x = (piece.gathered() for piece in pair)
        if writes:
            whole_pairs[layer] = s.cpu(), x.cpu()

    def finish() -> None:
        if split.is_sharded:
            total = {"total_parameters": sum(tensor.numel() for tensor in names.values()), **split.metadata}
            files.write_json(folder / files.INDEX_NAME, {"metadata": total, "weight_map": split.tensor_to_filename})
        write_checksums(folder)
        write_sparsity(frame, out_dir, whole_pairs, config)

    _on_first(finish)
    return True


def _begin(frame: PreTrainedModel, folder: Path) -> None:
    with library_bars(False):  # transformers would show one of no files
        write_plain(frame, folder, {})  # all but the weights
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()


def _on_first(write: Callable[[], None]) -> None:
    """Write on the first process; an error of writing is raised on all, so that none waits in the next gathering."""
    error: Exception | None = None
    if own_rank()[0] == 0:
        try:
            write()
        except (OSError, SafetensorError, UserError) as found:
            error = found
    message = gather(None if error is None else one_line(error))[0]
    if error is not None:
        raise error
    if message is not None:
        raise SharedError(message)
