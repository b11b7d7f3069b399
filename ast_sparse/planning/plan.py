"""What a run will do and need, worked out on the meta device before any weight is loaded (`--dry-run`)."""

import copy
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
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
from ast_sparse.storage.companions import companion_files
from ast_sparse.storage.files import has_adapter, sparse_keys, tensor_shapes, weight_files
from ast_sparse.storage.locate import load_model_config, load_tokenizer
from ast_sparse.storage.origin import check_saving, read_generation_config, source_folder
from ast_sparse.storage.packed import decode_on_load
from ast_sparse.storage.quantized import forget_quantization
from ast_sparse.training.callbacks.flops import match_flops, student_parameters, teacher_parameters
from ast_sparse.training.callbacks.late_slorb import check_baseline
from ast_sparse.training.checks.features import check_feature_settings, check_feature_shapes
from ast_sparse.training.checks.inputs import check_vocabularies
from ast_sparse.training.fsdp import check_shardable, sharding_plugin

_LARGEST_TENSOR = 2**40  # entries; more is a slip in a config
_LONGEST_REASON = 200  # characters of another library's error that are shown


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a plan is made for.

    Attributes:
        world_size: number of devices; None for that of the launcher.
        device_memory: GiB of each; None for those of the GPU that is there, of the machine where the run is to use
            its CPU, and 80 otherwise.
        peak_tflops: of a device, dense, in the precision of the run; None for those of the GPU that is there, and of
            an H100 SXM otherwise.
        mfu: share of them that a run makes use of.
    """

    world_size: int | None = None
    device_memory: float | None = None
    peak_tflops: float | None = None
    mfu: float = 0.35

    def __post_init__(self) -> None:
        for name in ("world_size", "device_memory", "peak_tflops", "mfu"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {value} must be above 0.")
        if self.mfu > 1:
            raise UserError(f"--mfu {self.mfu} must be 1 or less: it is a share.")


@dataclass(frozen=True)
class Plan:
    """Layers and tokens of a run, and what it costs.

    Attributes:
        sparsity: which layers are pruned and which are not.
        steps: optimizer steps, or None where the length of the data decides.
        tokens_per_step: over all processes and accumulated batches.
        flops_per_token: of student and teacher.
        model_config: of the student, overrides applied.
        notes: lines on settings that change what the others say.
        memory: counts what a device holds; None where it was not asked for.
    """

    sparsity: SparsityReport
    steps: int | None
    tokens_per_step: int
    flops_per_token: int
    model_config: PreTrainedConfig
    notes: tuple[str, ...] = ()
    memory: MemoryModel | None = None

    def lines(self) -> list[str]:
        """The plan as text, without memory and time, which depend on the hardware."""
        lines = [*self.sparsity.lines(), *self.notes]
        per_step = f"{self.tokens_per_step:,} tokens a step"
        if self.steps is None:
            lines.append(f"tokens: {per_step}; training.max_steps is not set, so the data decides the number of steps")
        else:
            lines.append(f"tokens: {self.steps:,} steps x {per_step} = {self.steps * self.tokens_per_step:,}")
        return lines


def make_plan(config: RunConfig, args: TrainingArguments, world_size: int | None = None) -> Plan:
    """Build the model on the meta device, select its layers, and count.

    Args:
        world_size: plan for so many devices, memory included; None for a run of this one.

    Raises:
        UserError: the model cannot be found or built, its files are damaged, a shape does not fit the pattern or
            SLoRB, no layer is left, the teacher's vocabulary or shape does not fit the kind of distillation, or a
            block or an evaluation window is longer than the model's.
    """
    notes = [f"weights: random, of training.seed={args.seed}"] if config.model.random_weights else []
    distills = config.distillation is not None and config.distillation.needs_teacher
    reads_weights = not config.model.random_weights or (distills and config.model.teacher is None)
    if world_size is not None and has_config_alone(config.model):
        reads_weights = False
        notes.append(f"weights: {config.model.name_or_path!r} holds none; its config.json is all that a plan needs")
    model_config = _student_config(config.model, reads_weights)
    _check_windows(config, model_config)
    check_feature_settings(config.distillation, model_config, args)
    if distills and config.model.teacher is not None:
        notes += _check_teacher(config.model.teacher, model_config, config)
    model = _meta_model(config.model, model_config)
    _check_saving(config.model, model_config)
    if sharding_plugin(args) is not None:
        check_shardable(model)
    student = student_parameters(model, config.sparsity, config.slorb)
    teacher, trusted = config.model.teacher or model, config.model.trust_remote_code
    args, matched = match_flops(args, config.distillation, student, lambda: teacher_parameters(teacher, trusted))
    check_baseline(config.sparsity, config.slorb, args)
    taught_by = teacher_parameters(teacher, trusted) if distills else 0
    dense = copy.deepcopy(model) if world_size is not None and distills else None
    report = sparsify_model(model, config.sparsity, config.slorb)
    devices = world_size or args.world_size
    notes += [] if matched is None else [f"steps: {matched}"]
    return Plan(
        sparsity=report,
        steps=args.max_steps if args.max_steps > 0 else None,
        tokens_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * devices
        * config.data.block_size,
        flops_per_token=6 * student + 2 * taught_by,
        model_config=model_config,
        notes=tuple(notes),
        memory=None if world_size is None else _memory_model(config, model, dense),
    )  # fmt: skip


def _memory_model(config: RunConfig, student: PreTrainedModel, dense: PreTrainedModel | None) -> MemoryModel:
    hessians = 0
    if config.sparsity.criterion == "sparsegpt":
        widths = [layer.weight.shape[layer.group_dim] for layer in sparse_layers(student).values()]
        hessians = 4 * sum(width**2 for width in widths)
    if dense is not None and config.model.teacher is not None:
        name = config.model.teacher
        trusted = config.model.trust_remote_code
        settings = ModelConfig(name_or_path=name, trust_remote_code=trusted)
        dense = _meta_model(settings, load_model_config(name, trust_remote_code=trusted))
    return MemoryModel(student, dense, config.distillation, hessians)


def meta_student(model: ModelConfig) -> PreTrainedModel:
    """The dense model on the meta device: its configuration and files are checked, no weight is loaded.

    Raises:
        UserError: the model cannot be found or built, or its files are damaged or sparse already.
    """
    config = _student_config(model)
    built = _meta_model(model, config)
    _check_saving(model, config)
    return built


def _student_config(model: ModelConfig, reads_weights: bool = True) -> PreTrainedConfig:
    path = Path(model.name_or_path).expanduser()
    if model.revision is not None and path.exists():
        raise UserError(
            f"model.revision={model.revision!r} belongs to a model on the hub, and {model.name_or_path!r} is local. "
            "Remove it."
        )
    for key, value in model.config_overrides.items():
        if "drop" in key and isinstance(value, int | float) and not 0 <= value < 1:
            raise UserError(f"model.config_overrides.{key}={value} must be 0 or more and below 1.")
    config = load_model_config(
        model.name_or_path,
        revision=model.revision,
        gguf_file=model.gguf_file,
        trust_remote_code=model.trust_remote_code,
        config_overrides=model.config_overrides,
    )
    if path.is_dir() and model.gguf_file is None and reads_weights:
        _check_dense(path)
    if reads_weights:
        decode_on_load(config, model.name_or_path)
    forget_quantization(config)  # a plan counts the decoded model
    return config


def _check_saving(model: ModelConfig, config: PreTrainedConfig) -> None:
    """Whether what a run saves beside the weights can be read and written."""
    folder = source_folder(config)
    generation = None if folder is None else read_generation_config(folder)
    if folder is not None:
        companion_files(folder)
    check_saving(model.name_or_path, config, generation)


def has_config_alone(model: ModelConfig) -> bool:
    """Whether a folder holds no weights, which a plan can do without."""
    folder = Path(model.name_or_path).expanduser()
    weights = ("*.safetensors", "*.safetensors.index.json", "*.bin")
    return folder.is_dir() and model.gguf_file is None and not any(any(folder.glob(name)) for name in weights)


def _check_dense(folder: Path) -> None:
    """Whole files of a model without our masks or SLoRB, which training would start from twice."""
    names = [name for file in weight_files(folder) for name in tensor_shapes(file)]
    if sparse_keys(names)[0] or has_adapter(folder):
        raise UserError(
            f"model.name_or_path={str(folder)!r} is the result of a run, with masks or SLoRB. Name the dense model, "
            "or continue the run with --resume."
        )


def _check_teacher(name: str, student: PreTrainedConfig, config: RunConfig) -> list[str]:
    """Notes on a teacher that can be read and fits."""
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
    except UserError:  # said by the run; a plan needs none
        return None


def _check_windows(config: RunConfig, model_config: PreTrainedConfig) -> None:
    asked = {"data.block_size": config.data.block_size, "evaluation.seq_len": config.evaluation.seq_len}
    if config.sparsity.init != "magnitude":
        asked["calibration.seq_len"] = config.calibration.seq_len
    _check_lengths(asked, model_config, repr(config.model.name_or_path))


def _check_lengths(asked: dict[str, int | None], model_config: PreTrainedConfig, model: str) -> None:
    limit = max_positions(model_config)
    for name, length in asked.items():
        if limit is not None and length is not None and length > limit:
            raise UserError(
                f"{name}={length} is longer than the {limit} positions of {model}. Set it to {limit} or less."
            )


def _meta_model(model: ModelConfig, config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights."""

    def build(attn_implementation: str | None) -> PreTrainedModel:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=attn_implementation,
                trust_remote_code=model.trust_remote_code,
            )

    try:
        built = build(model.attn_implementation)
        sizes = {name: math.prod(parameter.shape) for name, parameter in built.named_parameters()}
        if name := next((name for name, size in sizes.items() if not 0 < size < _LARGEST_TENSOR), None):
            raise ValueError(f"`{name}` would have shape {tuple(built.get_parameter(name).shape)}")
        return built
    except Exception as error:  # whatever a config with impossible values makes the code of its model raise
        reason = _one_line(error)
    if model.attn_implementation is not None:
        try:
            build(None)
        except Exception:  # the configuration is to blame, not the attention
            pass
        else:
            raise UserError(
                f"model.attn_implementation={model.attn_implementation!r} cannot be used: {reason}. "
                "Use sdpa or eager, or remove it."
            )
    raise UserError(
        f"The model of {model.name_or_path!r} cannot be built: {reason}. "
        "Check its config.json and model.config_overrides."
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    text = text if " " in text else f"{type(error).__name__} {text}"  # KeyError: 'relux'
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} …"
