"""What a changed setting means for a resumed run: every setting is in exactly one class.

- `same`: it decides the resulting weights, so it must have the value of the checkpoint;
- `content`: it names an input whose content is compared instead, so a folder may have moved;
- `free`: it does not change the weights; a change is printed;
- `length`, `batch`: compared together with others;
- `unkept`: secrets and what a launcher sets; not saved in a checkpoint.
"""

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

from accelerate import ParallelismConfig
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from ast_sparse.config import OptimizerConfig, SLoRBConfig, SparsityConfig
from ast_sparse.sparsity.oneshot import METHODS

Kind = Literal["same", "content", "free", "length", "batch", "unkept"]

_SECTIONS: dict[str, Kind] = {  # for fields that are not named below, including future ones
    "model": "same", "data": "same", "sparsity": "same", "distillation": "same", "slorb": "same",
    "basis": "same", "calibration": "free", "evaluation": "free", "watch": "free",
    "optimizer": "same",  # OptimizerConfig, or the settings of one that the user built
}  # fmt: skip
_FIELDS: dict[str, Kind] = {
    "model.name_or_path": "content", "model.revision": "content", "model.gguf_file": "content",
    "model.teacher": "content", "model.attn_implementation": "free", "model.trust_remote_code": "free",
    "data.root": "content", "data.train": "content", "data.eval": "content", "data.text_field": "content",
    "optimizer.offload": "free",  # the same steps
    "sparsity.masked_weights": "free",  # the same results
    "sparsity.kernels": "free",  # with `auto`, a resume continues with those of the checkpoint
    "sparsity.fast_forward": "free",  # speed and memory
    "sparsity.semi_structured": "free",  # speed and memory
}  # fmt: skip
_TRAINING: dict[Kind, tuple[str, ...]] = {
    "same": (
        "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
        "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
        "average_tokens_across_devices", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "tf32",
        "use_liger_kernel", "liger_kernel_config", "auto_find_batch_size", "seed", "data_seed", "ignore_data_skip",
        "accelerator_config", "deepspeed", "dataloader_drop_last", "dataloader_in_order",
        "remove_unused_columns", "label_names", "train_sampling_strategy", "length_column_name",
    ),
    "length": ("max_steps", "num_train_epochs"),
    "batch": ("per_device_train_batch_size", "gradient_accumulation_steps"),
    "free": (
        "output_dir", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
        "report_to", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
        "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm",
        "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only",
        "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
        "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "load_best_model_at_end",
        "metric_for_best_model", "greater_is_better", "save_only_model", "save_strategy", "save_steps",
        "save_on_each_node", "save_total_limit", "enable_jit_checkpoint", "push_to_hub", "hub_private_repo",
        "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "restore_callback_states_from_checkpoint",
        # speed and memory, with the same mathematics
        "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
        "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_cache",
        "torch_empty_cache_steps", "full_determinism", "use_cpu", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
        "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
        "ddp_timeout", "fsdp", "fsdp_config", "parallelism_config", "debug", "skip_memory_metrics",
    ),
    "unkept": ("hub_token", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"),
}  # fmt: skip
_ACCELERATOR, _ACCUMULATION, _SYNC = "accelerator_config", "gradient_accumulation_kwargs", "sync_each_batch"
_SYNCS = f"{_ACCELERATOR}.{_ACCUMULATION}.{_SYNC}"  # `free`, in a setting that is `same`
_KIND = {name: kind for kind, names in _TRAINING.items() for name in names}
_MOVING = ("params", "initial_lr", "mask_decay")  # entries of an optimizer's group that change with the steps
_EVALUATIONS = (
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "metric_for_best_model", "greater_is_better",
)  # fmt: skip
# schedules whose rate depends only on the steps so far
_ENDLESS = (
    SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP, SchedulerType.INVERSE_SQRT,
    SchedulerType.REDUCE_ON_PLATEAU,
)  # fmt: skip


def kind_of(section: str, key: str) -> Kind:
    """The class of a setting; `same` for a field of TrainingArguments that is not in the table."""
    if section == "training":
        return "free" if key == _SYNCS else _KIND.get(key, "same")
    return _FIELDS.get(f"{section}.{key}", _SECTIONS[section])


def depending(args: TrainingArguments, sparsity: SparsityConfig, update: str) -> set[str]:
    """The `free` settings that do decide the weights in this run.

    Args:
        update: `data.update.type`, the rule by which shares of domains follow the held-out losses.
    """
    found = set()
    if update != "constant" or args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        found |= {f"training.{name}" for name in _EVALUATIONS}
    if not all(METHODS[method].by_magnitude for method in (sparsity.init, sparsity.criterion)):
        found.add("calibration")
    return found


def past_follows_length(sparsity: SparsityConfig, slorb: SLoRBConfig | None) -> str | None:
    """The setting that makes the masks of past steps depend on the total number of steps; None if there is none."""
    if sparsity.is_gradual:
        return f"sparsity.schedule={sparsity.schedule}"
    if slorb is not None and slorb.enabled and slorb.start > 0:
        return f"slorb.start={slorb.start}"
    return None


def rest_follows_length(args: TrainingArguments, sparsity: SparsityConfig) -> list[str]:
    """The settings that make learning rate and mask decay depend on the total number of steps."""
    kind, found = SchedulerType(args.lr_scheduler_type), []
    if kind not in _ENDLESS:
        found.append(f"training.lr_scheduler_type={kind.value}")
    elif kind != SchedulerType.CONSTANT and 0 < args.warmup_steps < 1:
        found.append(f"training.warmup_steps={args.warmup_steps}")
    if sparsity.decay_schedule == "annealed" and sparsity.mask_decay > 0 and sparsity.decay_ramp > 0:
        found.append("sparsity.decay_schedule=annealed")
    return found


def training_values(args: TrainingArguments) -> dict[str, Any]:
    """The fields of TrainingArguments that a checkpoint saves, as JSON values."""
    names = [item.name for item in dataclasses.fields(args)]
    return {name: plain(getattr(args, name)) for name in names if kind_of("training", name) != "unkept"}


def optimizer_values(optimizer: Any) -> dict[str, Any]:
    """The settings in the groups of an optimizer, each with its values in all groups."""
    groups = optimizer.param_groups
    values = {key: plain([group.get(key) for group in groups]) for key in groups[0] if key not in _MOVING}
    return {**values, "lr": plain([group.get("initial_lr", group["lr"]) for group in groups])}


def is_own_optimizer(settings: Mapping[str, Any]) -> bool:
    """Whether settings are those of `OptimizerConfig`, and not `optimizer_values` of one that the user built."""
    return "moments" in settings


def comparable_optimizers(
    was: dict[str, Any] | None, now: dict[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Settings of two optimizers by which they can be compared; None for SparseTrainer's own beside a user's.

    Args:
        was: None if it was SparseTrainer's own and the checkpoint is older than `OptimizerConfig`.
    """
    was = was or OptimizerConfig().to_dict()
    if is_own_optimizer(was) == is_own_optimizer(now):
        return was, now
    return (None, now) if is_own_optimizer(was) else (was, None)


def comparable_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """`training_values` by which two runs can be compared: when gradients are reduced is a setting of its own.

    The rest of accelerate's settings for accumulation has no effect: Trainer counts micro-batches itself. It also wrote
    a number of its own there in older checkpoints.
    """
    config = values.get(_ACCELERATOR)
    if not isinstance(config, Mapping):
        return dict(values)
    rest = {key: value for key, value in config.items() if key != _ACCUMULATION}
    return {**values, _ACCELERATOR: rest, _SYNCS: (config.get(_ACCUMULATION) or {}).get(_SYNC)}


def plain(value: Any) -> Any:
    """A value as it is after a round trip through JSON."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, ParallelismConfig):  # without the sizes that other kinds of parallelism have
        return {"dp_replicate_size": value.dp_replicate_size, "dp_shard_size": value.dp_shard_size}
    return plain(value.to_dict()) if hasattr(value, "to_dict") else str(value)
