"""What one pass adds to a device's memory, found by running it on tensors that have shapes but no data.

The pass is the real one (student, teacher, loss, backward pass). Live bytes are added up after every operation, so no
formula depends on the architecture, the attention or the loss.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation.features import needs_attention
from ast_sparse.distillation.gpu_rows import is_planned_for_gpu
from ast_sparse.distillation.head import OutputHead
from ast_sparse.kernels.fast_forward import fast_forward
from ast_sparse.planning.live_bytes import LiveBytes, counted_gradients
from ast_sparse.planning.setup import Setup
from ast_sparse.sparsity.layers import SparseLayer, out_by_in
from ast_sparse.sparsity.masked_copy import MaskedCopy
from ast_sparse.sparsity.model import decoder_blocks, sparse_layers
from ast_sparse.storage.tied import is_tied
from ast_sparse.training.losses import MicroBatchLoss

# The student in a pass: `whole` makes masked copies of its weights; `kept` has them from the step's first pass on;
# `gathered` has all weights in the dtype of the products, as FSDP2 gathers them; `offloaded` has those of masked layers
# in it.
Form = Literal["whole", "kept", "gathered", "offloaded"]

_LOSS, _BLOCKS = "loss", "blocks"
_MASKLESS = "ast_sparse_planned_sdpa"  # sdpa looks at data to decide if it needs a mask; fake tensors have no data
AttentionInterface.register(_MASKLESS, sdpa_attention_forward)


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of a pass, without weights.

    Attributes:
        activations: all but gradients.
        gradients: those at that moment.
        at_loss: the peak between the last block's forward pass and its backward pass, gradients included.
        in_blocks: the peak at other times, gradients included.
    """

    activations: int = 0
    gradients: int = 0
    at_loss: int = 0
    in_blocks: int = 0


class Passes:
    """The passes of a student and its teacher; each is run once for all setups that agree on it.

    Args:
        student: already sparse, on the meta device.
        teacher: dense, on the meta device, or None.
        distillation: the loss.

    Raises:
        Exception: whatever a model's code raises if it cannot run without data.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, distillation: DistillationConfig | None
    ) -> None:
        self.distillation = distillation
        if needs_attention(distillation):
            for model in (student, teacher):
                if model is not None:
                    model.set_attn_implementation("eager")
        student.config.use_cache = False  # as Trainer does
        for model in (student, teacher):
            if model is not None and model.config._attn_implementation == "sdpa":
                model.set_attn_implementation(_MASKLESS)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.student = student
        self.teacher = teacher
        self._peaks: dict[tuple[Any, ...], Peak] = {}

    def step(self, setup: Setup, keeps_gradients: bool) -> Peak:
        """Forward and backward pass of a micro-batch.

        Args:
            keeps_gradients: whether gradients are there when it begins, or are sent away when they are made; they are
                then not counted, except under FSDP2 those of embeddings that are also the head.
        """
        form = "kept" if setup.holds_masked_weights else _form(setup)
        kept = (setup.gradient_checkpointing, keeps_gradients, form, setup.fast_forward)
        return self._once("step", (setup.batch_size, setup.block_size, setup.dtype, *kept))

    def evaluation(self, setup: Setup) -> Peak:
        """Forward pass of a batch of held-out blocks; nothing without evaluation."""
        if not setup.eval_batch_size:
            return Peak()
        kept = (False, False, _form(setup))
        return self._once("evaluation", (setup.eval_batch_size, setup.block_size, setup.dtype, *kept))

    def measurement(self, setup: Setup) -> Peak:
        """Forward pass of a window whose perplexity is measured, in float32; nothing without measurements."""
        if not setup.measured_tokens:
            return Peak()
        form: Form = "gathered" if setup.sharding == "fsdp2" else "whole"
        return self._once("evaluation", (1, setup.measured_tokens, torch.float32, False, False, form))

    def _once(self, kind: str, key: tuple[Any, ...]) -> Peak:
        name = (kind, is_planned_for_gpu(), *key)
        if name not in self._peaks:
            with torch.set_grad_enabled(kind == "step"):
                self._peaks[name] = self._run(kind == "step", *key)
        return self._peaks[name]

    def _run(
        self,
        train: bool,
        batch_size: int,
        length: int,
        dtype: torch.dtype,
        checkpointed: bool,
        drops: bool,
        form: Form,
        is_fast: bool = False,
    ) -> Peak:
        student, sharded = self._student(dtype, form), form == "gathered"
        teacher = None
        if self.teacher is not None and train:  # its weights have the dtype of the matrix products
            teacher = self._fake(self.teacher, dtype).requires_grad_(False).eval()
        live = LiveBytes()
        live.ignore([] if form != "kept" else [each.values for each in self._keep_masked_weights(student, dtype)])
        for model in (student, teacher):
            live.ignore([] if model is None else [*model.parameters(), *model.buffers()])
        student.train(train)
        passing = {p for p in student.parameters() if p.requires_grad} if drops else set()
        if sharded and is_tied(student):  # FSDP2 reduces it when the pass ends
            passing.discard(student.get_input_embeddings().weight)
        # fast_forward comes before the fake mode: it runs modules to see what they compute, which needs data
        with _checkpointing(student, checkpointed), \
             fast_forward(*((student, teacher) if is_fast else ())), \
             self._mode, counted_gradients(student, live, passing, not sharded), \
             _phases(student, live), live:  # fmt: skip
            ids = torch.zeros((batch_size, length), dtype=torch.long)
            loss = self._loss(student, teacher, {"input_ids": ids}, ids.clone(), dtype)
            if train:
                loss.backward()
        return Peak(live.peak - live.peak_gradients, live.peak_gradients, live.peaks[_LOSS], live.peaks[_BLOCKS])

    def _student(self, dtype: torch.dtype, form: Form) -> PreTrainedModel:
        """The student as a pass sees it."""
        student = self._fake(self.student, dtype if form == "gathered" else torch.float32)
        if form in ("whole", "kept"):
            return student
        for layer in sparse_layers(student).values():
            if layer.weight.dtype != dtype:
                with self._mode:
                    layer.weight = nn.Parameter(layer.weight.to(dtype))
                    layer.weight.grad_dtype = torch.float32
            layer.masked_linear = partial(_product, layer)  # type: ignore[method-assign]
        return student

    def _keep_masked_weights(self, student: PreTrainedModel, dtype: torch.dtype) -> "list[_Copy]":
        """Give the sparse layers copies of their masked weights, as an earlier pass would have left them."""
        layers = [module for module in student.modules() if isinstance(module, SparseLayer)]
        with self._mode:
            copies = {layer.weight: _Copy(torch.empty_like(layer.weight, dtype=dtype)) for layer in layers}
        for layer in layers:
            layer.masked_copy = copies[layer.weight]
        return list(copies.values())

    def _fake(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        """A copy with tensors that have no data; parameters get `dtype`, buffers and masks keep theirs."""
        model = copy.deepcopy(model)
        made: dict[Tensor, Tensor] = {}  # so that tied tensors stay tied
        with self._mode:
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None and tensor not in made:
                            made[tensor] = _without_data(tensor, dtype)
                        if tensor is not None:
                            tensors[name] = made[tensor]  # type: ignore[assignment]
        return model

    def _loss(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        inputs: dict[str, Tensor],
        labels: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """The loss of a step as SparseTrainer computes it; only cross-entropy in evaluation."""
        heads = {}
        for owner, model in (("student", student), ("teacher", teacher)):
            linear = None if model is None else model.get_output_embeddings()
            if type(linear) is nn.Linear:
                heads[owner] = OutputHead(linear)  # scale and cap are left out: they take almost no memory
        compute = MicroBatchLoss(teacher, self.distillation, heads)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return compute(student, student, inputs, labels, needs_logits=False)[0]


class _Copy(MaskedCopy):
    """A copy that is up to date."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def of(self, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return self.values


def _form(setup: Setup) -> Form:
    return "offloaded" if setup.offload else "gathered" if setup.sharding == "fsdp2" else "whole"


@contextmanager
def _phases(model: PreTrainedModel, live: LiveBytes) -> Iterator[None]:
    """Tell `live` whether the blocks of a model run, or what comes between their forward and backward passes."""
    live.phase = _BLOCKS
    last = list(decoder_blocks(model).values())[-1]

    def passed(module: nn.Module, inputs: Any, output: Any) -> None:
        handle.remove()  # recomputation calls it again
        live.phase = _LOSS
        states = output if isinstance(output, Tensor) else output[0]
        if states.requires_grad:
            states.register_hook(lambda grad: setattr(live, "phase", _BLOCKS))

    handle = last.register_forward_hook(passed)
    try:
        yield
    finally:
        handle.remove()


def _without_data(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return torch.empty_like(tensor, device="cpu")
    kept = dtype if tensor.is_floating_point() else tensor.dtype
    return nn.Parameter(torch.empty_like(tensor, device="cpu", dtype=kept), requires_grad=tensor.requires_grad)


def _product(layer: SparseLayer, inputs: Tensor) -> Tensor:
    return F.linear(inputs, out_by_in(layer.weight, layer.group_dim), layer.bias)


@contextmanager
def _checkpointing(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # newer versions have renamed it
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()
