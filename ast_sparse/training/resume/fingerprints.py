"""Fingerprints of what a run reads: equal for the same weights, tokens and tokenizer, wherever they are stored."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ast_sparse.data.blocks.domains import DomainBlocks
from ast_sparse.data.blocks.stored import TokenBlocks
from ast_sparse.data.blocks.streaming import StreamedBlocks
from ast_sparse.data.sources.entries import text_files
from ast_sparse.data.tokens.tokenise import tokenizer_key
from ast_sparse.distributed.pieces import local, reshard, rows_of, sum_over_pieces

_COLUMNS = ("attention_mask", "input_ids", "labels", "position_ids")
_ROWS = 2048  # hashed at once
_FIRST = 256  # rows of a stream; the rest is not read before training
_SAMPLED = 1024  # rows of a data set that computes them on access
_PIECES, _PIECE = 64, 2**16  # pieces of a streamed file, and bytes of each
_CHUNK = 2**20  # entries of a tensor whose bits are summed together
_TAKEN = 2**14  # entries of a tensor that are hashed one by one
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# entries of a configuration that do not change the function that the model computes
_NOT_THE_MODEL = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "auto_map",
    "_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
    "_experts_implementation", "_experts_implementation_internal",
)  # fmt: skip


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes and weights: sums over the bits of all entries, and a sample of the entries.

    It is the same for a sharded model as for the whole one; all processes must call this if it is sharded.
    """
    reshard(model)  # a forward pass may have left weights gathered
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            if not tensor.is_meta and tensor.numel():
                _add_bits(digest, tensor)
    return digest.hexdigest()[:32]


def _add_bits(digest: Any, tensor: Tensor) -> None:
    piece = local(tensor.detach())
    kind = _BITS.get(piece.element_size(), torch.uint8)
    flat = piece.contiguous().view(-1)
    bits = flat.view(kind) if flat.numel() else flat.new_empty(0, dtype=kind)
    if not isinstance(tensor, DTensor):
        parts = [part.sum(dtype=torch.int64) for part in bits.split(_CHUNK)]
        sums, taken = torch.stack(parts), bits[:: max(1, len(bits) // _TAKEN)].contiguous()
    else:
        sums, taken = _sharded_bits(bits, tensor)
    for part in (sums, taken):
        digest.update(part.cpu().numpy().tobytes())


def _sharded_bits(bits: Tensor, tensor: DTensor) -> tuple[Tensor, Tensor]:
    """Sums and sample of a whole tensor, from the bits of this process's rows."""
    total = tensor.numel()
    first = rows_of(tensor).start * (total // tensor.shape[0])  # place of the first entry in the whole
    step = max(1, total // _TAKEN)
    sums = torch.zeros(-(-total // _CHUNK), dtype=torch.int64, device=bits.device)
    before = -first % _CHUNK  # entries in the chunk that another process may have begun
    parts = [bits[:before], *bits[before:].split(_CHUNK)]
    for number, part in enumerate(parts, start=(first + before) // _CHUNK - 1):
        if part.numel():
            sums[number] += part.sum(dtype=torch.int64)
    taken = torch.zeros(-(-total // step), dtype=torch.int64, device=bits.device)
    mine = bits[-first % step :: step]
    start = -(-first // step)
    taken[start : start + len(mine)] = mine
    sums, taken = sum_over_pieces(torch.cat([sums, taken]), tensor).split([len(sums), len(taken)])
    return sums, taken.to(bits.dtype)


def config_values(config: PreTrainedConfig) -> dict[str, Any]:
    """The entries of a configuration that decide the function that the model computes."""
    values: dict[str, Any] = _without(json.loads(config.to_json_string(use_diff=True)))
    return values


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(part) for key, part in value.items() if key not in _NOT_THE_MODEL}
    return value


def tokenizer_values(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Values that decide the tokens of a text and the padding of rows."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        key = _hash(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    else:
        key = tokenizer_key(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    return {
        "vocabulary": key,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "chat_template": None if template is None else _hash(json.dumps(template, sort_keys=True).encode()),
    }


def blocks_fingerprint(blocks: Any) -> Any:
    """Hash of the token ids and labels of a data set, one for each part of a mixture.

    For a stream it covers the first 256 rows and samples of its local files; for a data set of a user's class, 1024
    rows spread over it. None if rows can be read only once.
    """
    if isinstance(blocks, DomainBlocks):
        blocks = blocks.parts
    if isinstance(blocks, Mapping):
        return {str(name): blocks_fingerprint(part) for name, part in blocks.items()}
    if isinstance(blocks, TokenBlocks):
        return blocks.fingerprint
    if isinstance(blocks, Dataset):
        return _table_fingerprint(blocks)
    if isinstance(blocks, StreamedBlocks):
        files = [file for entry in blocks.entries for file in text_files(entry, blocks.root, "data.train")[1]]
        return _rows_fingerprint(islice(iter(blocks), _FIRST), [file_sample(file) for file in files])
    if isinstance(blocks, datasets.IterableDataset):
        return _rows_fingerprint(islice(iter(blocks), _FIRST), "stream")
    if isinstance(blocks, list | tuple):
        return _rows_fingerprint(blocks, len(blocks))
    if isinstance(blocks, Sequence) or (hasattr(blocks, "__len__") and hasattr(blocks, "__getitem__")):
        chosen = np.unique(np.linspace(0, len(blocks) - 1, min(len(blocks), _SAMPLED), dtype=np.int64))
        with torch.random.fork_rng(devices=[]):
            return _rows_fingerprint((blocks[int(row)] for row in chosen), len(blocks))
    return None


def file_sample(file: Path) -> tuple[int, int]:
    """The size of a file and a checksum of pieces spread over it; files up to 4 MiB are read whole."""
    size, checksum = file.stat().st_size, 0
    with file.open("rb") as stream:
        for piece in range(_PIECES):
            stream.seek(size * piece // _PIECES)
            checksum = zlib.crc32(stream.read(_PIECE), checksum)
    return size, checksum


def _table_fingerprint(dataset: Dataset) -> str:
    columns = [name for name in _COLUMNS if name in dataset.column_names]
    digest = hashlib.sha256(repr((len(dataset), columns)).encode())
    for table in dataset.select_columns(columns).with_format("arrow").iter(_ROWS):
        for name in columns:
            for chunk in table.column(name).chunks:
                digest.update(np.asarray(pc.list_value_length(chunk)).astype("<i4").tobytes())
                digest.update(_numbers(pc.list_flatten(chunk)))
    return digest.hexdigest()[:32]


def _numbers(values: pa.Array) -> bytes:
    return values.to_numpy(zero_copy_only=False).astype("<i4", copy=False).tobytes()


def _rows_fingerprint(rows: Iterable[Any], size: Any) -> str:
    digest = hashlib.sha256(repr(size).encode())
    for row in rows:
        values = {name: row[name] for name in _COLUMNS if name in row} if isinstance(row, Mapping) else {}
        for name, value in values.items():
            digest.update(name.encode() + np.asarray(value).astype("<i4").tobytes())
    return digest.hexdigest()[:32]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
