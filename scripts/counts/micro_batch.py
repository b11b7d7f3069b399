"""Kernels of a whole micro-batch: of SparseTrainer, of plain distillation with transformers, and of the models alone.

The models are LLaMAs with toy widths and a real number of layers; student and teacher are equally large. bf16 autocast,
accumulation of `ACCUMULATION` micro-batches, in the second step, when every buffer is there.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import _disable_current_modes
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from scripts.counts.cases import (
    ALPHA,
    autocast,
    chunks_of,
    counting,
    in_chunks,
    is_head_product,
    loss,
    plain_loss,
)
from scripts.counts.operations import Traffic, is_arithmetic

ACCUMULATION, STEPS, BATCH = 4, 2, 2
VOCAB = 128


def new_model(layers: int) -> LlamaForCausalLM:
    """A LLaMA of toy widths."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def kernels(traffic: Traffic) -> dict[str, float]:
    """Launches of one of the micro-batches that were counted: all, and those without products and attention."""
    counts = {
        "kernels": traffic.total(),
        "kernels without products": traffic.total(lambda name: not is_arithmetic(name)),
    }
    return {name: total.kernels / ACCUMULATION for name, total in counts.items()}


def batch(chunks: int) -> torch.Tensor:
    """Token ids `[BATCH, chunks + 1]`: as many labels as rows in chunks of `BATCH`."""
    return torch.randint(0, VOCAB, (BATCH, chunks + 1))


def ours(layers: int, tokens: int, vocab: int, compiled: bool = False) -> dict[str, float]:
    """A micro-batch of SparseTrainer; its loss has as many chunks as with so many tokens and so large a vocabulary.

    Args:
        compiled: train with `torch_compile`, and count only what is outside the compiled graphs.
    """
    from ast_sparse import DistillationConfig, SparseTrainer, SparsityConfig

    chunks = chunks_of(tokens, vocab)

    class Counted(SparseTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step < STEPS - 1:
                return super().training_step(*args, **kwargs)
            with traffic:
                return super().training_step(*args, **kwargs)

    graphs_hidden = _graphs_hidden() if compiled else nullcontext()
    with graphs_hidden, in_chunks(chunks), counting() as traffic, tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, save_strategy="no", bf16=True,
            gradient_accumulation_steps=ACCUMULATION, logging_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True, torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None,
        )  # fmt: skip
        ids = [row.tolist() for _ in range(STEPS * ACCUMULATION) for row in batch(chunks)]
        trainer = Counted(
            new_model(layers), arguments, sparsity_config=SparsityConfig(mask_interval=STEPS + 1),
            distillation_config=DistillationConfig(alpha=ALPHA), train_dataset=[{"input_ids": row} for row in ids],
        )  # fmt: skip
        if hasattr(trainer, "fast_forward"):
            trainer.fast_forward = False
        trainer.train()
    return {**kernels(traffic), "chunks": chunks}


def _uncounted(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


@contextmanager
def _graphs_hidden() -> Iterator[None]:
    """Inside, decoders of SparseTrainer run as compiled graphs whose operations are not counted."""
    from ast_sparse.training import trainer
    from ast_sparse.training.start.model_calls import CompiledDecoders

    graphs = 0

    def hidden(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1

        return make_boxed_func(_uncounted(graph))

    class Hidden(CompiledDecoders):
        def __init__(self, models: Any, _: str, mode: str | None) -> None:
            super().__init__(models, aot_autograd(fw_compiler=hidden, bw_compiler=hidden), mode)
            # a counter would also have Dynamo compile nothing
            self._compiled = [(part, _uncounted(forward)) for part, forward in self._compiled]

    torch._dynamo.reset()
    with patch.object(trainer, "CompiledDecoders", Hidden):
        yield
    if graphs != 3:  # the student forward and backward, the teacher
        raise ValueError(f"Training compiled {graphs} graphs instead of 3.")


def plain(layers: int, has_loss: bool) -> dict[str, float]:
    """A micro-batch of transformers' models with full logits; without `has_loss` up to the hidden states only."""
    student, teacher = new_model(layers).train(), new_model(layers).eval()

    ids = batch(4)

    def micro_batch() -> None:
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
        with autocast():
            with torch.no_grad():
                reference = teacher(ids, use_cache=False) if has_loss else teacher.model(ids, use_cache=False)
            output = student(ids, use_cache=False) if has_loss else student.model(ids, use_cache=False)
            if has_loss:
                result = (
                    plain_loss(output.logits.flatten(0, 1), reference.logits.flatten(0, 1), labels) / labels.numel()
                )
            else:
                result = output.last_hidden_state
        result.backward(torch.ones_like(result))

    with counting() as traffic:
        micro_batch()
        for parameter in student.parameters():
            parameter.grad = None
        with traffic:
            for _ in range(ACCUMULATION):
                micro_batch()
    return kernels(traffic)


def loss_kernels(tokens: int, vocab: int) -> dict[str, float]:
    """Launches of the loss of a micro-batch of so many tokens, without products with heads."""
    chunks = chunks_of(tokens, vocab)
    loss("ours", 2, 1)  # kernels are tried once
    return {"kernels": loss("ours", 2 * chunks, chunks).total(lambda name: not is_head_product(name)).kernels}
