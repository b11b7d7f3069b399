"""Sparse tiny models and changed checkpoint files for the export tests."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.sparsity.model import densify_model, sparse_layers, sparsify_model
from ast_sparse.storage.files import write_json
from tests.models import VOCAB, tiny_model, tiny_tokenizer


def sparse_model(
    family: str = "llama", slorb_k: int | None = None, pattern: str = "2:4", seed: int = 0
) -> PreTrainedModel:
    """A model with sparse layers, whose masks are not the magnitude masks, so that a wrong mask is noticed."""
    model = tiny_model(family, seed).eval()
    slorb = None if slorb_k is None else SLoRBConfig(enabled=True, k=slorb_k)
    sparsify_model(model, SparsityConfig(pattern=pattern), slorb)
    for layer in sparse_layers(model).values():
        layer.mask.data = layer.mask.data.roll(2, dims=1 - layer.group_dim)
        if layer.slorb is not None:
            torch.nn.init.normal_(layer.slorb.X)
    return model


def plain_sparse_model(family: str = "llama", pattern: str = "2:4") -> PreTrainedModel:
    """A plain model whose pruned weights are zero."""
    model = sparse_model(family, pattern=pattern)
    densify_model(model)
    return model


def masked_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """State dict of the plain model, masked and rounded; written out independently of the package."""
    layers = {f"{name}.weight": layer.mask for name, layer in sparse_layers(model).items()}
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith((".mask", ".start_mask", ".slorb.S", ".slorb.X")):
            continue
        value = value.clone()
        if name in layers:
            value[~layers[name]] = 0.0
        state[name] = value.to(dtype)
    return state


def save_training_checkpoint(model: PreTrainedModel, folder: Path) -> Path:
    """What the Trainer saves within a run: dense weights and masks under their raw names."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_run_checkpoint(model: PreTrainedModel, folder: Path) -> Path:
    """The same with its record, which says that there is SLoRB if the model has it."""
    has_slorb = any(layer.slorb is not None for layer in sparse_layers(model).values())
    write_json(save_training_checkpoint(model, folder) / "sparsity_config.json", {"slorb": {"enabled": has_slorb}})
    return folder


def token_ids(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the weight file of a folder after `change` edited its tensors, and remove its checksums."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata={"format": "pt"})
    (folder / "checksums.json").unlink(missing_ok=True)
