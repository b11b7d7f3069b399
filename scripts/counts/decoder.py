"""Kernels of a micro-batch with `torch_compile`: those of compiled decoders as the inductor plans them, and the rest.

The decoders run compiled as in a training (`CompiledDecoders`), the student under bf16 autocast with sparse layers in
all its blocks, the teacher in bfloat16 without gradients. Widths are true. Tensors are never filled, so that a block of
7B fits; its kernels are neither compiled nor run.
"""

import importlib
from collections import Counter
from contextlib import nullcontext
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.counts.cases import autocast
from scripts.counts.inductor import launches, planned
from scripts.counts.micro_batch import ours

Graphs = dict[str, Counter[str]]
MODELS: dict[str, tuple[int, int, dict[str, Any]]] = {  # rows and length of a micro-batch, configuration
    "SmolLM2-135M, 8 x 2048": (8, 2048, dict(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )),
    "LLaMA2-7B, 1 x 4096": (1, 4096, dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)),
}  # fmt: skip


def micro_batch_launches(name: str, layers: int, tokens: int, vocab: int) -> dict[str, float]:
    """Launches of a micro-batch of one of `MODELS` with `torch_compile`, by kind; empty if no decoder is compiled.

    They are the sum of what is outside the graphs, counted while SparseTrainer trains a toy, and of the graphs. Models
    of one, two and three blocks are counted: a further block must cost the same.
    """
    try:
        importlib.import_module("ast_sparse.training.start.model_calls")
    except ModuleNotFoundError:  # earlier code
        return {}
    rows, length, widths = MODELS[name]
    one, two, three = (
        {
            "outside": Counter({"kernels": ours(blocks, tokens, vocab, compiled=True)["kernels"]}),
            **planned_launches({**widths, "vocab_size": vocab}, blocks, rows, length),
        }
        for blocks in (1, 2, 3)
    )
    found = {}
    for graph in one:
        for kind in one[graph] | two[graph] | three[graph]:
            counts = [each[graph][kind] for each in (one, two, three)]
            block = counts[1] - counts[0]
            if counts[2] - counts[1] != block:
                raise ValueError(f"{graph}, {kind}: {counts} launches in models of one, two and three blocks.")
            found[f"{graph}: {kind}"] = counts[0] + (layers - 1) * block
    return {"kernels": sum(found.values()), **found}


def planned_launches(config: dict[str, Any], blocks: int, rows: int, length: int) -> Graphs:
    """Launches of each graph, by kind, of a model with so many blocks."""
    from ast_sparse.sparsity import layers
    from ast_sparse.training.start.model_calls import CompiledDecoders, borders_known

    found: Graphs = {}
    ids = torch.zeros(rows, length, dtype=torch.int64)
    for side, graphs in {"student": ("student, forward", "student, backward"), "teacher": ("teacher",)}.items():
        model = _model(config, blocks, side == "student")
        torch._dynamo.reset()
        with planned(launches) as (backend, counts), \
             CompiledDecoders([model], backend, None), \
             patch.object(layers, "product_as", _product_as, create=True):  # fmt: skip
            with borders_known({}), autocast(), nullcontext() if side == "student" else torch.no_grad():
                hidden = model.model(ids, use_cache=False).last_hidden_state
            if side == "student":
                hidden.backward(torch.empty_like(hidden))
        found |= dict(zip(graphs, counts, strict=True))
    return found


def _product_as(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The product that code which finds itself on a GPU takes."""
    return torch.mm(left, right) if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


class _Copy:
    """A kept masked weight that is never written. Writing it is counted outside the graphs."""

    def of(self, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(weight, dtype=dtype)

    def compressed(self, group_dim: int) -> None:
        return None


def _model(config: dict[str, Any], blocks: int, is_student: bool) -> LlamaForCausalLM:
    """A model whose tensors have no values."""
    from ast_sparse.sparsity.layers import SparseLayer, make_sparse
    from ast_sparse.sparsity.masks import Pattern

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, **config))
        for layer in [each for each in model.model.layers.modules() if type(each) is nn.Linear] if is_student else []:
            make_sparse(layer, torch.empty(layer.weight.shape, dtype=torch.bool), Pattern(2, 4))
    model = model.to_empty(device="cpu").train(is_student)
    for module in model.modules():
        if isinstance(module, SparseLayer):
            module.masked_copy = cast(Any, _Copy())
    if not is_student:
        for parameter in model.requires_grad_(False).parameters():  # buffers stay in float32
            parameter.data = parameter.data.bfloat16()
    return model
