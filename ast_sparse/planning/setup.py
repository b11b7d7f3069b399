"""The settings of a run that decide how much memory it takes on one device."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, TrainingArguments

from ast_sparse.config import RunConfig
from ast_sparse.evaluation.perplexity import default_seq_len
from ast_sparse.training.checks.parallelism import grid_of, replicas_and_shards
from ast_sparse.training.checks.semi_structured import dense_products
from ast_sparse.training.fsdp import sharding_plugin
from ast_sparse.training.start.model_calls import graphs_read_copies

_COMPRESSED = 2 * 9 / 16  # of 16 bits: half of the values, and their positions
Sharding = Literal["none", "ddp", "fsdp2"]


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
        shard_size: number of pieces if `training.parallelism_config` sets it, replicas are the other devices; None: one
            piece a device.
        syncs_each_batch: gradients of a sharded run are reduced after every micro-batch; otherwise whole ones are kept.
        measured_tokens: tokens in a window whose perplexity is measured; 0: nothing is measured.
        measured_by: the settings that turn off the measurements of this run; empty if nothing is measured.
        offload: masters, moments and masks are in host memory; the device has masked weights in 16 bits.
        moments: format of the moments of masked weights; `8bit` only without sharding and offload.
        on_cpu: the devices are processes on a CPU.
        eager: masks and updates are computed by PyTorch operations, not by compiled kernels.
        fast_forward: a step recomputes norms, activations and gates, unless it recomputes whole blocks.
        masked_weights: whether masked weights are kept in 16 bits, or made when needed; `auto` counts as `kept`;
            None: neither, in a forward pass that is dense or a CUDA graph.
        semi_structured: whether forward products are semi-structured, by a compressed form of the kept masked weights;
            `auto` counts as `on`.
        in_graphs: products are in compiled graphs, which hold what they make from the forward to the backward pass.
    """

    batch_size: int
    eval_batch_size: int
    gradient_accumulation_steps: int
    block_size: int
    dtype: torch.dtype
    gradient_checkpointing: bool
    world_size: int = 1
    sharding: Sharding = "none"
    shard_size: int | None = None
    syncs_each_batch: bool = True
    measured_tokens: int = 0
    measured_by: tuple[str, ...] = ()
    offload: bool = False
    moments: Literal["float32", "8bit"] = "float32"
    on_cpu: bool = False
    eager: bool = False
    fast_forward: bool = True
    masked_weights: Literal["auto", "kept", "made"] | None = "made"
    semi_structured: Literal["off", "auto", "on"] = "off"
    in_graphs: bool = False

    @classmethod
    def of_run(
        cls, config: RunConfig, args: TrainingArguments, model_config: PreTrainedConfig | None, devices: int
    ) -> "Setup":
        """The setup of a configuration on a number of devices.

        Args:
            model_config: of the student; None: nothing is measured.

        Raises:
            UserError: the sizes of `training.parallelism_config` do not give the number of devices.
        """
        sharding: Sharding = "fsdp2" if sharding_plugin(args) is not None else "ddp" if devices > 1 else "none"
        evaluation, is_dense = config.evaluation, config.sparsity.forward == "dense"
        reads = not args.torch_compile or graphs_read_copies(args.torch_compile_backend, args.torch_compile_mode)
        measured_by = ["evaluation.datasets=[]"] if evaluation.datasets else []
        measured_by += ["evaluation.report=false"] if evaluation.report else []
        on_cpu = bool(config.training.get("use_cpu"))
        is_plain = on_cpu or dense_products(config.sparsity, config.optimizer, args) is not None
        window = 0
        if model_config is not None and measured_by:
            window = evaluation.seq_len or default_seq_len(model_config)
        return cls.of(
            args,
            config.data.block_size,
            devices,
            sharding,
            measured_tokens=window,
            measured_by=tuple(measured_by),
            on_cpu=on_cpu,
            offload=config.optimizer.offload,
            moments=config.optimizer.moments,
            eager=config.sparsity.kernels == "eager",
            masked_weights=config.sparsity.masked_weights if reads and not is_dense else None,
            semi_structured="off" if is_plain else config.sparsity.semi_structured,
            in_graphs=bool(args.torch_compile),
        )

    @classmethod
    def of(
        cls, args: TrainingArguments, block_size: int, world_size: int, sharding: Sharding, **others: Any
    ) -> "Setup":
        """The setup of a run's arguments; `others` are attributes that do not follow from them.

        Raises:
            UserError: the sizes of `training.parallelism_config` do not give the number of devices.
        """
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
            shard_size=_shard_size(args, world_size) if sharding == "fsdp2" else None,
            syncs_each_batch=syncs_each_batch(args),
            **others,
        )

    @property
    def is_half(self) -> bool:
        """Whether matrix products run in 16 bits."""
        return self.dtype != torch.float32

    @property
    def makes_masked_weights(self) -> bool:
        """Whether a device makes masked weights in 16 bits by itself."""
        return self.is_half and self.sharding != "fsdp2" and not self.offload

    @property
    def has_masked_weights(self) -> bool:
        """Whether a device may keep them over a step."""
        return self.masked_weights is not None and self.makes_masked_weights

    @property
    def keeps_masked_weights(self) -> bool:
        """Whether a device keeps them over a step."""
        return self.has_masked_weights and self.masked_weights != "made"

    @property
    def holds_masked_weights(self) -> bool:
        """Whether those of all layers are there at the end of a forward pass."""
        in_graphs = self.in_graphs and not self.gradient_checkpointing
        return self.keeps_masked_weights or (in_graphs and self.makes_masked_weights)

    @property
    def compressed_bytes(self) -> float:
        """Bytes a masked weight of what semi-structured products multiply by."""
        return _COMPRESSED if self.keeps_masked_weights and self.semi_structured != "off" else 0

    @property
    def pieces(self) -> int:
        """Number of pieces into which student, moments and teacher are cut."""
        return (self.shard_size or self.world_size) if self.sharding == "fsdp2" else 1

    @property
    def keeps_whole_gradients(self) -> bool:
        """Whether each device of a sharded run keeps whole gradients between micro-batches."""
        return self.sharding == "fsdp2" and self.gradient_accumulation_steps > 1 and not self.syncs_each_batch


def syncs_each_batch(args: TrainingArguments) -> bool:
    """Whether a sharded run reduces its gradients after every micro-batch, which it does unless told otherwise."""
    given = getattr(args.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    return bool(given.get("sync_each_batch", True))


def _shard_size(args: TrainingArguments, devices: int) -> int | None:
    """`dp_shard_size` of `training.parallelism_config`; None if it is not set."""
    return None if replicas_and_shards(args) in (None, (1, 1)) else grid_of(args, devices)[1]
