"""What a run will do and need, computed on the meta device before any weights are loaded (`--dry-run`)."""

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ast_sparse.config import ModelConfig, RunConfig
from ast_sparse.errors import UserError
from ast_sparse.evaluation.perplexity import max_positions
from ast_sparse.planning.memory import MemoryModel
from ast_sparse.sparsity.model import SparsityReport, sparse_layers, sparsify_model
from ast_sparse.sparsity.oneshot import METHODS
from ast_sparse.sparsity.select import decoder_blocks
from ast_sparse.storage.files import weight_files
from ast_sparse.storage.locate import load_model_config, load_tokenizer
from ast_sparse.storage.meta import check_savable, has_config_alone, meta_model, student_config
from ast_sparse.storage.packed import decode_on_load
from ast_sparse.storage.tied import untie_head
from ast_sparse.training.callbacks.flops import match_flops, student_parameters, teacher_parameters
from ast_sparse.training.checks.baselines import check_baseline
from ast_sparse.training.checks.features import check_feature_settings, check_feature_shapes
from ast_sparse.training.checks.inputs import check_recomputing, check_vocabularies
from ast_sparse.training.fsdp import check_shardable, sharding_plugin

_GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The hardware that a plan is for.

    Attributes:
        world_size: number of devices; None: as many as the launcher starts.
        device_memory: GiB of a device; None: that of this machine's GPU, or of the machine itself if the run uses its
            CPU; 80 if there is no GPU.
        peak_tflops: of a device, dense, in the precision of the run; None: that of this machine's GPU, or of an H100
            SXM if there is none.
        mfu: share of the peak that a run uses.
        gpus_per_node: devices, and processes, of a machine; None: as many as the launcher starts there, 8 without one.
        written_for: the number of devices whose batch is to be kept; None: that of the launcher, without one 1 and
            the devices of a machine.
    """

    world_size: int | None = None
    device_memory: float | None = None
    peak_tflops: float | None = None
    mfu: float = 0.35
    gpus_per_node: int | None = None
    written_for: int | None = None

    def __post_init__(self) -> None:
        for name in ("world_size", "device_memory", "peak_tflops", "mfu", "gpus_per_node", "written_for"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {value} must be above 0.")
        if self.mfu > 1:
            raise UserError(f"--mfu {self.mfu} must be 1 or less: it is a share.")

    @property
    def node(self) -> int:
        """Devices of a machine."""
        return self.gpus_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or _GPUS_PER_NODE

    def compared_with(self, launched: int) -> tuple[int, ...]:
        """Numbers of devices that the settings may be written for, in a process that is one of `launched`."""
        if self.written_for is not None:
            return (self.written_for,)
        return (launched,) if launched > 1 else (1, self.node)


@dataclass(frozen=True)
class Plan:
    """Layers and tokens of a run, and what it costs.

    Attributes:
        sparsity: which layers are pruned and which are not.
        steps: optimizer steps, or None if they depend on the length of the data.
        tokens_per_step: of all processes and accumulated batches.
        flops_per_token: of student and teacher.
        model_config: of the student, with overrides applied.
        notes: lines about settings that change the numbers above.
        memory: computes the memory that a device needs; None if it was not asked for.
        start_bytes: of the files of the start; 0 if the run makes none.
    """

    sparsity: SparsityReport
    steps: int | None
    tokens_per_step: int
    flops_per_token: int
    model_config: PreTrainedConfig
    notes: tuple[str, ...] = ()
    memory: MemoryModel | None = None
    start_bytes: int = 0

    def lines(self) -> list[str]:
        """The plan as text, without memory and time, which depend on the hardware."""
        lines = [*self.sparsity.lines(), *self.notes]
        per_step = f"{self.tokens_per_step:,} tokens per step"
        if self.steps is None:
            lines.append(
                f"tokens: {per_step}; training.max_steps is not set, so the data decides the number of steps: "
                "set it to plan them"
            )
        else:
            lines.append(f"tokens: {self.steps:,} steps x {per_step} = {self.steps * self.tokens_per_step:,}")
        return lines


def make_plan(
    config: RunConfig, args: TrainingArguments, world_size: int | None = None, with_memory: bool = False
) -> Plan:
    """Build the model on the meta device, select its layers, and count.

    Args:
        world_size: number of devices to plan for, memory included; None to plan a run that starts now.
        with_memory: plan its memory too.

    Raises:
        UserError: the model cannot be found or built, its files are damaged, a shape does not fit the pattern or
            SLoRB, no layer is left, the teacher's vocabulary or shape does not fit the kind of distillation, or a
            block or an evaluation window has more tokens than the model has positions.
    """
    notes = [f"weights: random, from training.seed={args.seed}"] if config.model.random_weights else []
    distills = config.distillation is not None and config.distillation.needs_teacher
    reads_weights = not config.model.random_weights or (distills and config.model.teacher is None)
    if world_size is not None and has_config_alone(config.model):
        reads_weights = False
        notes.append(f"weights: {config.model.name_or_path!r} has none; a plan needs only its config.json")
    model_config = student_config(config.model, reads_weights)
    _check_windows(config, model_config)
    check_feature_settings(config.distillation, model_config, args)
    if distills and config.model.teacher is not None:
        notes += _check_teacher(config.model.teacher, model_config, config)
    model = meta_model(config.model, model_config)
    if config.basis is not None and config.basis.unties:
        untie_head(model)
    check_savable(config.model, model_config, model)
    check_recomputing(model, args)
    if sharding_plugin(args) is not None:
        check_shardable(model)
    student = student_parameters(model, config.sparsity, config.slorb)
    teacher, trusted = config.model.teacher or model, config.model.trust_remote_code
    args, matched = match_flops(args, config.distillation, student, lambda: teacher_parameters(teacher, trusted))
    check_baseline(config.sparsity, config.slorb, args)
    taught_by = teacher_parameters(teacher, trusted) if distills else 0
    with_memory = with_memory or world_size is not None
    dense = copy.deepcopy(model) if with_memory and distills else None
    report = sparsify_model(model, config.sparsity, config.slorb)
    devices = world_size or args.world_size
    notes += [] if matched is None else [f"steps: {matched}"]
    notes += _slorb_notes(config)
    if size := start_bytes(config, model):
        samples = config.calibration.samples
        notes.append(f"start: made once from {samples} sequences, about {size / 2**30:.1f} GiB in start/")
    return Plan(
        sparsity=report,
        steps=args.max_steps if args.max_steps > 0 else None,
        tokens_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * devices
        * config.data.block_size,
        flops_per_token=6 * student + 2 * taught_by,
        model_config=copy.deepcopy(model_config),  # a memory model changes that of the models
        notes=tuple(notes),
        memory=_memory_model(config, model, dense) if with_memory else None,
        start_bytes=size,
    )  # fmt: skip


def makes_start(config: RunConfig) -> bool:
    """Whether text decides what a new run starts from."""
    changes = config.basis is not None and config.basis.is_on
    return METHODS[config.sparsity.init].needs_text or changes


def start_bytes(config: RunConfig, student: PreTrainedModel) -> int:
    """Bytes of the tensors in the files of a start; 0 if the run makes none.

    Each decoder block has a file: weights and SLoRB in float32, first masks in bits. A change of basis also changes
    what is outside the blocks, which is written too.

    Args:
        student: sparse, on any device, with a head of its own if the run unties it.
    """
    if not makes_start(config):
        return 0
    changes = config.basis is not None and config.basis.is_on
    written: list[nn.Module] = [student] if changes else list(decoder_blocks(student).values())
    named = [item for module in written for item in module.named_parameters() if not item[0].endswith(".mask")]
    return sum(parameter.numel() * parameter.element_size() for _, parameter in named)


def _slorb_notes(config: RunConfig) -> list[str]:
    """A better start of SLoRB, if there is one."""
    init, slorb = config.sparsity.init, config.slorb
    if slorb is None or not slorb.enabled or slorb.start > 0 or slorb.init == "svd" or not METHODS[init].needs_text:
        return []
    return [f"slorb: after sparsity.init={init}, slorb.init=svd starts closer to the dense model than {slorb.init}"]


def _memory_model(config: RunConfig, student: PreTrainedModel, dense: PreTrainedModel | None) -> MemoryModel:
    hessians = 0
    if METHODS[config.sparsity.criterion].needs_hessian:
        widths = [layer.weight.shape[layer.group_dim] for layer in sparse_layers(student).values()]
        hessians = 4 * sum(width**2 for width in widths)
    if dense is not None and config.model.teacher is not None:
        name = config.model.teacher
        trusted = config.model.trust_remote_code
        settings = ModelConfig(name_or_path=name, trust_remote_code=trusted)
        dense = meta_model(settings, load_model_config(name, trust_remote_code=trusted))
    return MemoryModel(student, dense, config.distillation, hessians, makes_start(config))


def _check_teacher(name: str, student: PreTrainedConfig, config: RunConfig) -> list[str]:
    """Notes on the teacher; raises UserError if it cannot be read or does not fit."""
    path = Path(name).expanduser()
    try:
        teacher = load_model_config(name, trust_remote_code=config.model.trust_remote_code)
        if path.is_dir():
            weight_files(path)
        decode_on_load(teacher, name)
    except UserError as error:
        raise UserError(f"model.teacher={name!r}: {error}") from None
    note, _ = check_vocabularies(student, teacher, _tokenizer(config.model), name, config.model.trust_remote_code)
    check_feature_shapes(config.distillation, student, teacher)
    _check_lengths({"data.block_size": config.data.block_size}, teacher, f"model.teacher={name!r}")
    return [] if note is None else [note]


def _tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase | None:
    keys = ("revision", "gguf_file", "trust_remote_code")
    try:
        return load_tokenizer(model.name_or_path, **{key: getattr(model, key) for key in keys})
    except UserError:  # the run raises it; a plan needs no tokenizer
        return None


def _check_windows(config: RunConfig, model_config: PreTrainedConfig) -> None:
    asked = {"data.block_size": config.data.block_size, "evaluation.seq_len": config.evaluation.seq_len}
    if makes_start(config):
        asked["calibration.seq_len"] = config.calibration.seq_len
    _check_lengths(asked, model_config, repr(config.model.name_or_path))


def _check_lengths(asked: dict[str, int | None], model_config: PreTrainedConfig, model: str) -> None:
    limit = max_positions(model_config)
    for name, length in asked.items():
        if limit is not None and length is not None and length > limit:
            raise UserError(
                f"{name}={length} is longer than the {limit} positions of {model}. Set it to {limit} or less."
            )
