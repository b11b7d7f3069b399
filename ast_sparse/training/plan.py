"""What a run will do and need, worked out on the meta device before any weight is loaded (`--dry-run`)."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainingArguments

from ast_sparse.config import DistillationConfig, ModelConfig, RunConfig
from ast_sparse.errors import UserError
from ast_sparse.evaluation.perplexity import max_positions
from ast_sparse.export.files import has_adapter, sparse_keys, tensor_shapes, weight_files
from ast_sparse.loading import load_model_config
from ast_sparse.sparsity.model import SparsityReport, sparse_layers, sparsify_model
from ast_sparse.training.baselines import check_baseline
from ast_sparse.training.flops import match_flops, student_parameters, teacher_parameters
from ast_sparse.training.inputs import check_vocabularies
from ast_sparse.training.teacher import check_feature_settings, check_feature_shapes

GIB = 2**30
_LARGEST_TENSOR = 2**40  # entries; more is a slip in a config
_LONGEST_REASON = 200  # characters of another library's error that are shown


@dataclass(frozen=True)
class Plan:
    """Layers, tokens and memory of a run.

    Attributes:
        sparsity: which layers are pruned and which are not.
        steps: optimizer steps, or None where the length of the data decides.
        tokens_per_step: over all processes and accumulated batches.
        memory: bytes by item, per device, activations of the blocks not counted.
        model_config: of the student, overrides applied.
        notes: lines on settings that change what the others say.
    """

    sparsity: SparsityReport
    steps: int | None
    tokens_per_step: int
    memory: dict[str, int]
    model_config: PreTrainedConfig
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The plan as text."""
        lines = [*self.sparsity.lines(), *self.notes]
        per_step = f"{self.tokens_per_step:,} tokens a step"
        if self.steps is None:
            lines.append(f"tokens: {per_step}; training.max_steps is not set, so the data decides the number of steps")
        else:
            lines.append(f"tokens: {self.steps:,} steps x {per_step} = {self.steps * self.tokens_per_step:,}")
        lines.append("memory per device, activations of the blocks not counted:")
        lines += [f"  {item:<40} {size / GIB:8.2f} GiB" for item, size in self.memory.items() if size]
        lines.append(f"  {'total':<40} {sum(self.memory.values()) / GIB:8.2f} GiB")
        return lines


def make_plan(config: RunConfig, args: TrainingArguments) -> Plan:
    """Build the model on the meta device, select its layers, and count.

    Raises:
        UserError: the model cannot be found or built, its files are damaged, a shape does not fit the pattern or
            SLoRB, no layer is left, the teacher's vocabulary or shape does not fit the kind of distillation, or a
            block or an evaluation window is longer than the model's.
    """
    distills = config.distillation is not None and config.distillation.needs_teacher
    reads_weights = not config.model.random_weights or (distills and config.model.teacher is None)
    model_config = _student_config(config.model, reads_weights)
    _check_windows(config, model_config)
    check_feature_settings(config.distillation, model_config, args)
    if distills and config.model.teacher is not None:
        _check_teacher(config.model.teacher, model_config, config.distillation)
    model = _meta_model(config.model, model_config)
    parameters = student_parameters(model, config.sparsity, config.slorb)
    teacher = config.model.teacher or model
    args, matched = match_flops(args, config.distillation, parameters, lambda: teacher_parameters(teacher))
    check_baseline(config.sparsity, config.slorb, args)
    report = sparsify_model(model, config.sparsity, config.slorb)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sequences = args.per_device_train_batch_size
    half = args.bf16 or args.fp16
    vocab = model_config.get_text_config().vocab_size
    logits = sequences * config.data.block_size * vocab * 4  # accelerate hands the student's on in float32
    memory = {
        "weights (float32 masters)": 4 * trained,
        "masks": report.pruned_parameters * 9 // 8,
        "gradients": 4 * trained,
        "moments": 8 * trained,
        "gradient buckets of DDP": 4 * trained if args.world_size > 1 else 0,
        "logits of student, their gradient": 2 * logits,
    }
    if config.sparsity.criterion == "sparsegpt":
        widths = [layer.weight.shape[layer.group_dim] for layer in sparse_layers(model).values()]
        memory["Hessians of a refresh, at most"] = 4 * sum(width**2 for width in widths)
    if distills:
        memory["teacher"] = (2 if half else 4) * report.total_parameters
        memory["logits of teacher"] = logits // 2 if half else logits
    per_step = sequences * args.gradient_accumulation_steps * args.world_size * config.data.block_size
    notes = [f"weights: random, of training.seed={args.seed}"] if config.model.random_weights else []
    notes += [] if matched is None else [f"steps: {matched}"]
    steps = args.max_steps if args.max_steps > 0 else None
    return Plan(report, steps, per_step, memory, model_config, tuple(notes))


def meta_student(model: ModelConfig) -> PreTrainedModel:
    """The dense model on the meta device: its configuration and files are checked, no weight is loaded.

    Raises:
        UserError: the model cannot be found or built, or its files are damaged or sparse already.
    """
    return _meta_model(model, _student_config(model))


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
    return config


def _check_dense(folder: Path) -> None:
    """Whole files of a model without our masks or SLoRB, which training would start from twice."""
    names = [name for file in weight_files(folder) for name in tensor_shapes(file)]
    if sparse_keys(names)[0] or has_adapter(folder):
        raise UserError(
            f"model.name_or_path={str(folder)!r} is the result of a run, with masks or SLoRB. Name the dense model, "
            "or continue the run with --resume."
        )


def _check_teacher(name: str, student: PreTrainedConfig, distillation: DistillationConfig | None) -> None:
    path = Path(name).expanduser()
    try:
        teacher = load_model_config(name)
        if path.is_dir():
            weight_files(path)
    except UserError as error:
        raise UserError(f"model.teacher={name!r}: {error}") from None
    check_vocabularies(student, teacher)
    check_feature_shapes(distillation, student, teacher)


def _check_windows(config: RunConfig, model_config: PreTrainedConfig) -> None:
    window = max_positions(model_config)
    asked = {"data.block_size": config.data.block_size, "evaluation.seq_len": config.evaluation.seq_len}
    if config.sparsity.init != "magnitude":
        asked["calibration.seq_len"] = config.calibration.seq_len
    for name, length in asked.items():
        if window is not None and length is not None and length > window:
            raise UserError(
                f"{name}={length} is longer than the {window} positions of {config.model.name_or_path!r}. "
                f"Set it to {window} or less."
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
