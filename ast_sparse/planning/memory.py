"""How much memory a device needs: what is always there, and what a step adds, measured by running it on fake tensors.

The step is the real one (student, teacher, loss, backward pass), on tensors that have shapes but no data. Live bytes
are added up after every operation, so no formula depends on the architecture, the attention or the loss.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedModel, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation.features import needs_attention
from ast_sparse.distillation.head import OutputHead
from ast_sparse.kernels.fast_forward import fast_forward
from ast_sparse.planning.live_bytes import LiveBytes, counted_gradients
from ast_sparse.sparsity.model import decoder_blocks, sparse_layers
from ast_sparse.training.fsdp import sharding_plugin
from ast_sparse.training.losses import MicroBatchLoss

Sharding = Literal["none", "ddp", "fsdp2"]

_MASKLESS = "ast_sparse_planned_sdpa"  # sdpa looks at data to decide if it needs a mask; fake tensors have no data
AttentionInterface.register(_MASKLESS, sdpa_attention_forward)


@dataclass(frozen=True)
class Setup:
    """The settings that decide how much memory training takes on one device.

    Attributes:
        batch_size, eval_batch_size: per device; an eval_batch_size of 0 means no evaluation.
        gradient_accumulation_steps: micro-batches in a step.
        block_size: tokens in a sequence.
        dtype: of the matrix products: float32, or the dtype of autocast.
        gradient_checkpointing: blocks keep only their input, and run again in the backward pass.
        world_size: number of devices.
        sharding: whether each device holds everything (`ddp`) or its piece (`fsdp2`) during training.
        measured_by: the settings that turn off the measurements of this run, which need the whole student on one
            device; empty if nothing is measured.
        on_cpu: the devices are processes on a CPU, and a sharded student is gathered in their memory to be saved.
    """

    batch_size: int
    eval_batch_size: int
    gradient_accumulation_steps: int
    block_size: int
    dtype: torch.dtype
    gradient_checkpointing: bool
    world_size: int = 1
    sharding: Sharding = "none"
    measured_by: tuple[str, ...] = ()
    on_cpu: bool = False

    @classmethod
    def of(
        cls,
        args: TrainingArguments,
        block_size: int,
        world_size: int,
        sharding: Sharding,
        measured_by: tuple[str, ...] = (),
        on_cpu: bool = False,
    ) -> "Setup":
        """The setup of a run's arguments."""
        plugin = sharding_plugin(args)
        evaluates = getattr(args.eval_strategy, "value", args.eval_strategy) != "no" or args.eval_on_start
        return cls(
            batch_size=args.per_device_train_batch_size,
            eval_batch_size=args.per_device_eval_batch_size if evaluates else 0,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            block_size=block_size,
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
            gradient_checkpointing=bool(
                args.gradient_checkpointing or (plugin is not None and plugin.activation_checkpointing)
            ),
            world_size=world_size,
            sharding=sharding,
            measured_by=measured_by,
            on_cpu=on_cpu,
        )

    @property
    def is_half(self) -> bool:
        """Whether matrix products run in 16 bits."""
        return self.dtype != torch.float32


@dataclass(frozen=True)
class Memory:
    """Bytes by item at the moment when a device uses most memory.

    Attributes:
        moment: the name of that moment.
        others: total bytes at the other moments.
    """

    items: dict[str, int]
    moment: str
    others: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(self.items.values())


@dataclass(frozen=True)
class _Peak:
    """Bytes at the peak of a pass, without weights: gradients, and all else as activations."""

    activations: int
    gradients: int = 0


class MemoryModel:
    """The memory of a student and its teacher with any setup.

    Args:
        student: already sparse, on the meta device.
        teacher: dense, on the meta device, or None.
        distillation: the loss.
        hessians: bytes of the Hessians for mask refreshes by SparseGPT.

    Raises:
        Exception: whatever a model's code raises if it cannot run without data.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        distillation: DistillationConfig | None,
        hessians: int = 0,
    ) -> None:
        self.distillation = distillation
        self.hessians = hessians
        if needs_attention(distillation):
            for model in (student, teacher):
                if model is not None:
                    model.set_attn_implementation("eager")
        student.config.use_cache = False  # as Trainer does
        for model in (student, teacher):
            if model is not None and model.config._attn_implementation == "sdpa":
                model.set_attn_implementation(_MASKLESS)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.student = self._fake(student)
        self.teacher = teacher
        self._peaks: dict[tuple[Any, ...], _Peak] = {}

    def __call__(self, setup: Setup) -> Memory:
        """The memory of one device at the moment of a run when it uses most."""
        held, gathered = self._held(setup), self._gathered(setup)
        gradients = _trained_bytes(self.student) // self._pieces(setup)
        step, evaluation = self._step(setup), self._evaluation(setup)
        activations = "activations, logits, temporaries"
        moments = {
            "forward and backward pass": {
                **held,
                **gathered,
                "gradients": gradients if self._keeps_gradients(setup) else step.gradients,
                activations: step.activations,
            },
            "update of the weights": {
                **held,
                "gradients": gradients,
                "temporaries of the update": self._update_bytes() // self._pieces(setup),
            },
        }
        if evaluation.activations:
            moments["evaluation"] = {**held, **gathered, activations: evaluation.activations}
        if setup.sharding == "fsdp2":
            passing = _passing_bytes(self.student, setup.is_half)
            moments["forward and backward pass"]["gradients before they are sharded"] = passing
            whole = {**held, "the whole student in float32, its masks": _parameter_bytes(self.student)}
            if setup.measured_by:
                moments["measurement of the retrained model"] = whole
            if setup.on_cpu:
                masked = sum(layer.weight.nbytes for layer in sparse_layers(self.student).values())
                moments["saving of the retrained model"] = {**whole, "masked copies of its weights": masked}
        totals = {name: sum(items.values()) for name, items in moments.items()}
        moment = max(totals, key=lambda name: totals[name])
        items = {name: size for name, size in moments[moment].items() if size}
        return Memory(items, moment, {name: total for name, total in totals.items() if name != moment})

    # ---- what is always there ------------------------------------------------------------------------------------

    def _held(self, setup: Setup) -> dict[str, int]:
        pieces = self._pieces(setup)
        trained = _trained_bytes(self.student)
        masks = sum(layer.mask.nbytes + layer.start_mask.nbytes for layer in sparse_layers(self.student).values())
        teacher = 0
        if self.teacher is not None:  # its embeddings and head are not sharded
            outside = _outside_bytes(self.teacher, setup.is_half) if setup.sharding == "fsdp2" else 0
            teacher = outside + (_compute_bytes(self.teacher, setup.is_half) - outside) // pieces
        return {
            "weights (float32 masters)": trained // pieces,
            "masks": masks // pieces,
            "moments": 2 * trained // pieces,
            "teacher": teacher,
            "gradient buckets of DDP": trained if setup.sharding == "ddp" else 0,
            "Hessians of a refresh": self.hessians,
        }

    def _gathered(self, setup: Setup) -> dict[str, int]:
        """What FSDP2 gathers during a pass: everything outside the student's blocks, and the current and next block.

        The teacher's blocks, which are smaller, are gathered before the student's first one.
        """
        if setup.sharding != "fsdp2":
            return {}
        outside = _outside_bytes(self.student, setup.is_half)
        return {"gathered blocks and embeddings": outside + 2 * _block_bytes(self.student, setup.is_half)}

    def _pieces(self, setup: Setup) -> int:
        return setup.world_size if setup.sharding == "fsdp2" else 1

    def _keeps_gradients(self, setup: Setup) -> bool:
        """Whether gradients of an earlier micro-batch exist when a pass begins."""
        return setup.gradient_accumulation_steps > 1 or setup.sharding == "fsdp2"

    def _update_bytes(self) -> int:
        """An upper bound: two temporaries of the largest weight; compiled kernels need none, eager CPU ones less."""
        return 2 * max(p.nbytes for p in self.student.parameters() if p.requires_grad)

    # ---- what a pass adds ----------------------------------------------------------------------------------------

    def _step(self, setup: Setup) -> _Peak:
        keeps = self._keeps_gradients(setup)
        key = (setup.batch_size, setup.block_size, setup.dtype, setup.gradient_checkpointing, keeps)
        if key not in self._peaks:
            self._peaks[key] = self._run(setup, setup.batch_size, train=True, drop_gradients=keeps)
        return self._peaks[key]

    def _evaluation(self, setup: Setup) -> _Peak:
        key = (setup.eval_batch_size, setup.block_size, setup.dtype)
        if not setup.eval_batch_size:
            return _Peak(0)
        if key not in self._peaks:
            with torch.no_grad():
                self._peaks[key] = self._run(setup, setup.eval_batch_size, train=False, drop_gradients=False)
        return self._peaks[key]

    def _run(self, setup: Setup, batch_size: int, train: bool, drop_gradients: bool) -> _Peak:
        teacher = None
        if self.teacher is not None and train:  # its weights have the dtype of the matrix products
            teacher = self._fake(copy.deepcopy(self.teacher), setup.dtype).requires_grad_(False).eval()
        live = LiveBytes()
        for model in (self.student, teacher):
            live.ignore([] if model is None else [*model.parameters(), *model.buffers()])
        self.student.train(train)
        # fast_forward comes before the fake mode: it runs modules to see what they compute, which needs data
        with _checkpointing(self.student, setup.gradient_checkpointing and train), \
             fast_forward(*((self.student, teacher) if train else ())), \
             self._mode, counted_gradients(self.student, live, drop_gradients), live:  # fmt: skip
            ids = torch.zeros((batch_size, setup.block_size), dtype=torch.long)
            loss = self._loss(teacher, {"input_ids": ids}, ids.clone(), setup)
            if train:
                loss.backward()
        self.student.zero_grad()
        return _Peak(live.peak - live.peak_gradients, live.peak_gradients)

    def _fake(self, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model with tensors that have no data; parameters get `dtype`, buffers and masks keep theirs."""
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

    def _loss(self, teacher: PreTrainedModel | None, inputs: dict[str, Tensor], labels: Tensor, setup: Setup) -> Tensor:
        """The loss of a step as SparseTrainer computes it; only cross-entropy in evaluation."""
        heads = {}
        for owner, model in (("student", self.student), ("teacher", teacher)):
            linear = None if model is None else model.get_output_embeddings()
            if type(linear) is nn.Linear:
                heads[owner] = OutputHead(linear)  # scale and cap are left out: they take almost no memory
        compute = MicroBatchLoss(teacher, self.distillation, heads)
        with torch.autocast("cpu", setup.dtype, enabled=setup.is_half):
            return compute(self.student, self.student, inputs, labels, needs_logits=False)[0]


def _without_data(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return torch.empty_like(tensor, device="cpu")
    kept = dtype if tensor.is_floating_point() else tensor.dtype
    return nn.Parameter(torch.empty_like(tensor, device="cpu", dtype=kept), requires_grad=tensor.requires_grad)


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


def _trained_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _block_bytes(model: PreTrainedModel, is_half: bool) -> int:
    """Bytes of the largest decoder block in the dtype of its computation."""
    return max(_compute_bytes(block, is_half) for block in decoder_blocks(model).values())


def _outside_bytes(model: PreTrainedModel, is_half: bool) -> int:
    """Bytes of embeddings, head and norms outside the decoder blocks, in the dtype of their computation."""
    inside = nn.ModuleList(decoder_blocks(model).values())  # one module, so that shared weights are counted once
    return _compute_bytes(model, is_half) - _compute_bytes(inside, is_half)


def _passing_bytes(model: PreTrainedModel, is_half: bool) -> int:
    """Bytes of one block's gradients, and of another's in float32 while they are reduced into the pieces."""
    largest = max(_trained_bytes(block) for block in decoder_blocks(model).values())
    return largest + (largest // 2 if is_half else largest)


def _compute_bytes(module: nn.Module, is_half: bool) -> int:
    return sum(p.nbytes // 2 if is_half and p.is_floating_point() else p.nbytes for p in module.parameters())
