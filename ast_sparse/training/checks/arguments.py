"""Settings of `TrainingArguments` that are wrong, or that AST would ignore or break, are refused before a run."""

import dataclasses
import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SaveStrategy, SchedulerType
from transformers.training_args import trainer_log_levels

from ast_sparse.distributed.meeting import check_restarted
from ast_sparse.errors import UserError, did_you_mean, one_line, shown
from ast_sparse.kernels.tf32 import tf32_kept
from ast_sparse.training.checks.parallelism import check_parallelism, parallelism_config
from ast_sparse.training.fsdp import env_flag, sharding_plugin

# field: reason and fix; refused unless it has its default
_REFUSED = {
    "optim": "AST trains with its own SparseAdamW. Remove it; set adam_beta1, adam_beta2, adam_epsilon, weight_decay.",
    "optim_args": "AST trains with its own SparseAdamW. Remove it.",
    "optim_target_modules": "AST trains with its own SparseAdamW. Remove it.",
    "deepspeed": "DeepSpeed shards weights where masks cannot follow. Remove it; set fsdp: true (FSDP2).",
    "label_smoothing_factor": "the distillation loss has no label smoothing. Remove it.",
    "use_liger_kernel": "Liger replaces the loss that AST computes itself. Remove it.",
    "bf16_full_eval": "it would turn the float32 master weights into bf16. Remove it; bf16 covers evaluation too.",
    "fp16_full_eval": "it would turn the float32 master weights into fp16. Remove it; fp16 covers evaluation too.",
    "enable_jit_checkpoint": "it saves before masks are refreshed. Remove it; ast-train saves on SIGTERM and SIGUSR1.",
    "save_on_each_node": "a checkpoint is one folder, not one for each node. Remove it.",
    "debug": "it cannot look at masks, which are not numbers. Remove it; watch.nan says what happens at a NaN.",
    "auto_find_batch_size": "a run whose batch size changes is not repeatable. Set per_device_train_batch_size.",
}
# only in a configuration file: transformers leaves these to scripts, and ast-train does not use them
_USELESS = {
    "do_train": (True, "ast-train always trains. Remove it; ast-eval measures a model."),
    "do_predict": (False, "ast-train predicts nothing. Remove it."),
    "resume_from_checkpoint": (None, "it would be ignored. Remove it, and start with --resume CHECKPOINT."),
    "local_rank": (-1, "torchrun sets it. Remove it."),
}
_AT_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1, "save_total_limit": 1, "torch_empty_cache_steps": 1, "dataloader_prefetch_factor": 1,
    "ddp_timeout": 1, "ddp_bucket_cap_mb": 1, "dataloader_num_workers": 0, "learning_rate": 0, "weight_decay": 0,
    "max_grad_norm": 0, "warmup_steps": 0, "eval_delay": 0, "neftune_noise_alpha": 0,
}  # fmt: skip
_ABOVE_ZERO = ("num_train_epochs", "adam_epsilon", "logging_steps", "save_steps", "eval_steps")
_CHOICES = {
    "log_level": tuple(trainer_log_levels),
    "log_level_replica": tuple(trainer_log_levels),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "torch_compile_backend": tuple(backend.value.lower() for backend in DynamoBackend),
    "metric_for_best_model": ("loss", "eval_loss"),
}
_ENGINES = {
    "DEEPSPEED": "DeepSpeed",
    "MEGATRON_LM": "Megatron-LM",
}
# trackers that save the model themselves when training ends, if a variable has such a value
_UPLOADS = {
    "wandb": ("WANDB_LOG_MODEL", "end|checkpoint"),
    "dvclive": ("HF_DVCLIVE_LOG_MODEL", "(?i:1|on|yes|true)"),
}
_GIVEN_TO_SCHEDULERS = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
_ANY_STEPS = 1000  # used if only the data decides the number of steps


def build_arguments(values: dict[str, Any], output_dir: str, is_decided: bool = True) -> TrainingArguments:
    """`TrainingArguments(**values)`, with each error in one line, and TF32 only if `tf32` asks for it.

    Args:
        is_decided: False if `bf16` is left out because it is decided later.

    Raises:
        UserError: a value is wrong, TrainingArguments refuses it, or AST would ignore a setting. The processes of a
            launcher, which it connects, do not find each other.
    """
    check_restarted()
    defaults = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    _check_refused({name: values[name] for name in _REFUSED if name in values}, defaults)
    _check_ranges(values)
    for name, (default, reason) in _USELESS.items():
        if name in values and values[name] != default:
            raise UserError(f"training.{name}={_short(values[name])}: {reason}")
    _check_choices(values, "metric_for_best_model")  # a SparseTrainer with compute_metrics has others
    arguments = {"log_on_each_node": False, **values, "output_dir": output_dir}  # what is said, is said once
    if "parallelism_config" in values:
        arguments["parallelism_config"] = parallelism_config(values["parallelism_config"])
    with warnings.catch_warnings(), tf32_kept() if values.get("tf32") is None else nullcontext():
        warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing has another name in newer versions
        try:
            args = TrainingArguments(**arguments)
        except Exception as error:  # whatever its many checks, and those of accelerate, raise
            if isinstance(error, RuntimeError) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
                raise UserError(
                    f"The processes cannot connect with each other: {one_line(error, end='stop')} Check that all were "
                    f"started, and reach MASTER_ADDR:MASTER_PORT={place}."
                ) from error
            raise UserError(_named(error, values, arguments)) from None
    check_arguments(args, is_decided=is_decided)
    return args


def _named(error: Exception, values: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """An error of TrainingArguments in one line, with the setting that causes it."""
    message = one_line(error, end="stop")
    for key in sorted(values.keys() - {"output_dir"}, key=lambda key: re.search(rf"\b{key}\b", message) is None):
        try:
            TrainingArguments(**{name: value for name, value in arguments.items() if name != key})
        except Exception:  # another setting is to blame
            continue
        return f"training.{key}={_short(values[key])}: {message} Correct or remove it."
    return f"training: {message} Correct the section."


def check_arguments(
    args: TrainingArguments, callbacks: Sequence[TrainerCallback] | None = None, is_decided: bool = True
) -> None:
    """Refuse settings that fail later, or that this trainer would ignore, and callbacks as settings of trackers.

    With `full_determinism`, the environment gets what cuBLAS needs for it. That is too late after a first product.

    Args:
        is_decided: False if the precision is decided later, so not yet compared with that of `accelerate launch`.

    Raises:
        UserError: the first of them, with its value and the fix.
    """
    if args.full_determinism:  # PyTorch looks once, at the first product; Trainer sets it later than masks are made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    values = {item.name: getattr(args, item.name) for item in dataclasses.fields(args)}
    _check_refused(values, {item.name: item.default for item in dataclasses.fields(args)})
    _check_ranges(values)
    for name in ("log_level", "log_level_replica", "train_sampling_strategy", "torch_compile_backend"):
        _check_choices(values, name)
    if not isinstance(args.bf16, bool):  # any text would turn it on
        raise UserError(
            f"TrainingArguments has bf16={shown(args.bf16)}, which only configurations of ast-train know. Set True or "
            "False."
        )
    _check_trackers(args.report_to)
    for callback in callbacks or ():
        check_callback(callback)
    _check_schedule(args)
    _check_checkpointing(args)
    _check_accumulation(args)
    check_shared_batches(args)
    _check_evaluation(args)
    if args.push_to_hub and args.hub_strategy not in ("end",):
        raise UserError(
            f"training.hub_strategy={_short(args.hub_strategy)} would upload weights that are not masked yet. "
            "Use hub_strategy: end."
        )
    _check_launched(args, is_decided)
    check_parallelism(args, is_sharded=sharding_plugin(args) is not None)
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel does not carry masks. Start with "
            "`torchrun --nproc_per_node` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0."
        )


def _check_evaluation(args: TrainingArguments) -> None:
    if args.save_strategy == SaveStrategy.BEST and args.metric_for_best_model is None:
        raise UserError("training.save_strategy='best' needs a metric to compare. Set metric_for_best_model: loss.")
    metric = args.metric_for_best_model or ""
    if metric.endswith("perplexity") and args.greater_is_better:  # which Trainer sets, unless it is said
        raise UserError(
            f"training.metric_for_best_model={_short(metric)} with greater_is_better=True would keep the worst model. "
            "Set greater_is_better: false, or metric_for_best_model: loss."
        )
    if args.label_names is not None and "labels" not in args.label_names:
        raise UserError(
            f"training.label_names={_short(args.label_names)} has no 'labels', where the labels of a causal LM are, so "
            "evaluation would have no loss. Remove it, or add 'labels'."
        )


def check_callback(callback: TrainerCallback | type[TrainerCallback]) -> None:
    """Refuse the callback of a tracker that would upload the student before it is masked.

    Raises:
        UserError: with the setting that makes it do so, and the fix.
    """
    kind = callback if isinstance(callback, type) else type(callback)
    for name in [name for name in _UPLOADS if issubclass(kind, INTEGRATION_TO_CALLBACK[name])]:
        if hasattr(callback, "_log_model"):  # one that has been made no longer reads the variable
            _check_log_model(name, callback._log_model, kind.__name__)
        else:
            _check_upload(name, kind.__name__)


def _check_launched(args: TrainingArguments, is_decided: bool) -> None:
    """Refuse what `accelerate launch` turns on where masks do not work, or the settings of the run do not say so."""
    for name, what in _ENGINES.items():
        if env_flag(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"accelerate is configured for {what} (ACCELERATE_USE_{name}), where masks cannot follow the weights. "
                "Use `accelerate launch --config_file configs/accelerate/fsdp2.yaml` (or ddp.yaml), or torchrun."
            )
    half, dynamo = str(args.mixed_precision), os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if is_decided and half != "no" and not (args.bf16 or args.fp16):
        known = f"Set training.{half}: true, or " if half in ("bf16", "fp16") else "Set "
        raise UserError(
            f"accelerate is configured for mixed_precision={half}, but training.bf16 and training.fp16 are off. "
            f"{known}mixed_precision: 'no' in accelerate's configuration."
        )
    if dynamo not in ("", "no") and not args.torch_compile:
        raise UserError(
            f"accelerate is configured for dynamo_backend={dynamo.upper()}, but training.torch_compile is off. "
            "Set training.torch_compile: true, or remove dynamo_config from accelerate's configuration."
        )


def _check_refused(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        value = values.get(name)
        default = getattr(defaults[name], "value", defaults[name])
        if getattr(value, "value", value) != default and value not in (None, False, [], {}, ""):
            raise UserError(f"training.{name}={_short(value)}: {reason}")


def _check_ranges(values: Mapping[str, Any]) -> None:
    def require(condition: bool, name: str, fix: str) -> None:
        if not condition:
            raise UserError(f"training.{name}={_short(values[name])} {fix}")

    given = {name: value for name, value in values.items() if isinstance(value, int | float)}
    for name in given.keys() & _AT_LEAST.keys():
        require(given[name] >= _AT_LEAST[name], name, f"must be {_AT_LEAST[name]} or more.")
    for name in given.keys() & set(_ABOVE_ZERO):
        require(given[name] > 0, name, "must be above 0.")
    for name in given.keys() & {"adam_beta1", "adam_beta2"}:
        require(0 <= given[name] < 1, name, "must be 0 or more and below 1.")
    for name in given.keys() & {"seed", "data_seed"}:
        require(0 <= given[name] < 2**32, name, "must lie between 0 and 4294967295.")
    if "max_steps" in given:
        steps = given["max_steps"]
        require(steps >= 1 or steps == -1, "max_steps", "must be 1 or more, or -1 if num_train_epochs decides.")
        require(steps < 2**31, "max_steps", "must be below 2147483648.")
    if given.get("warmup_steps", 0) > 1:
        require(given["warmup_steps"] % 1 == 0, "warmup_steps", "must be a whole number, or a share below 1.")


def _check_choices(values: Mapping[str, Any], name: str) -> None:
    value = values.get(name)
    if value is not None and value not in _CHOICES[name]:
        raise UserError(f"training.{name}={_short(value)} is unknown. {_choose(value, _CHOICES[name])}")


def _check_trackers(report_to: Any) -> None:
    """Refuse trackers that do not exist, and those that would upload the student before it is masked."""
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ("none", "all", *sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"training.report_to={_short(name)} is not a tracker. {_choose(name, known)}")
        # transformers does not always list these two as available
        if name not in (*get_available_reporting_integrations(), "azure_ml", "flyte"):
            raise UserError(f"training.report_to={_short(name)} is not installed. Install it, or set report_to: none.")
        if name in _UPLOADS:
            _check_upload(name, f"training.report_to={name}")


def _check_upload(tracker: str, where: str) -> None:
    variable, values = _UPLOADS[tracker]
    if re.fullmatch(values, value := os.environ.get(variable, "")):
        raise UserError(
            f"{variable}={shown(value)} would upload weights that are not masked yet ({where}). Unset it, and upload "
            "the folder of the finished model."
        )


def _check_log_model(tracker: str, value: Any, made: str) -> None:
    if value is True or getattr(value, "is_enabled", False):
        raise UserError(
            f"{made} was made with log_model={_short(value)}: it would upload weights that are not masked yet. Make it "
            f"without log_model and {_UPLOADS[tracker][0]}, and upload the folder of the finished model."
        )


def _check_schedule(args: TrainingArguments) -> None:
    """Build the learning-rate schedule as Trainer will, and run through it."""
    kind, given = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    where = f"training.lr_scheduler_kwargs={_short(given)}" if given else f"training.lr_scheduler_type={kind.value!r}"
    if not isinstance(given, dict):
        raise UserError(f"{where} is not a mapping. Write, for example, {{min_lr_rate: 0.1}}.")
    build = cast(Callable[..., Any], TYPE_TO_SCHEDULER_FUNCTION[kind])
    parameters = inspect.signature(build).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [name for name in parameters if name not in _GIVEN_TO_SCHEDULERS]
    if kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        known = []  # Trainer passes them none
    for key in given:
        if key not in known and not takes_any:
            raise UserError(f"{where}: the schedule {kind.value!r} does not take {key!r}. {_choose(key, known)}")
        if isinstance(given[key], int | float) and given[key] < 0:
            raise UserError(f"{where}: {key} is negative. Set it to 0 or more.")
    steps = args.max_steps if args.max_steps > 0 else _ANY_STEPS
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        with warnings.catch_warnings(action="ignore"):  # they are shown when Trainer builds it
            schedule = get_scheduler(kind, optimizer, args.get_warmup_steps(steps), steps, given)
        rate = getattr(schedule, "lr_lambdas", [lambda step: 1.0])[0]
        rates = [float(rate(steps * tenth // 10)) for tenth in range(11)]
    except Exception as error:  # anything that arguments of the wrong type or size raise
        fix = "Correct its arguments." if given else "Give its arguments in training.lr_scheduler_kwargs."
        raise UserError(f"{where}: the schedule cannot be built: {one_line(error, end='open')}. {fix}") from None
    if not all(math.isfinite(value) and -1e-6 <= value <= 1 + 1e-6 for value in rates):
        raise UserError(
            f"{where}: the schedule {kind.value!r} leaves the range from 0 to training.learning_rate="
            f"{args.learning_rate}. Correct its arguments."
        )


def _check_checkpointing(args: TrainingArguments) -> None:
    given = args.gradient_checkpointing_kwargs
    if not given:
        return
    where = f"training.gradient_checkpointing_kwargs={_short(given)}"
    if not args.gradient_checkpointing:
        raise UserError(f"{where} would be ignored. Set gradient_checkpointing: true, or remove it.")
    parameters = inspect.signature(checkpoint).parameters
    known = [name for name, parameter in parameters.items() if parameter.default is not parameter.empty]
    for key in given:
        if key not in (*known, "preserve_rng_state"):
            raise UserError(f"{where}: there is no {key!r}. {_choose(key, known)}")


def _check_accumulation(args: TrainingArguments) -> None:
    """Refuse what accelerate would not take, and a number of micro-batches that the plan would not know."""
    given = args.accelerator_config.gradient_accumulation_kwargs  # type: ignore[union-attr]
    if given is None:
        return
    where, known = "training.accelerator_config.gradient_accumulation_kwargs", ("sync_each_batch",)
    if not isinstance(given, Mapping):
        raise UserError(f"{where}={_short(given)} is not a mapping. Write {{sync_each_batch: false}}.")
    for key, value in given.items():
        if key == "num_steps":
            if value != 1:  # which Trainer itself writes there
                raise UserError(f"{where}.num_steps={_short(value)}: set gradient_accumulation_steps instead.")
        elif key not in known:
            raise UserError(f"{where}: {key!r} has no effect. {_choose(key, known)}")
        elif not isinstance(value, bool):
            raise UserError(f"{where}.{key}={_short(value)} is neither true nor false. Correct or remove it.")


def check_shared_batches(args: TrainingArguments, processes: int | None = None) -> None:
    """Refuse settings with which several processes would not train on a whole batch each.

    Args:
        processes: of the run; default: those of `args`.

    Raises:
        UserError: a batch would be split, and plan, records and checkpoints count whole ones; or some processes might
            get fewer batches than others.
    """
    config, processes = cast(AcceleratorConfig, args.accelerator_config), processes or args.world_size
    if processes > 1 and config.split_batches:
        raise UserError(
            f"training.accelerator_config.split_batches=True: {processes} processes would share a batch, and each is "
            "counted as if it had its own. Remove it; per_device_train_batch_size is the batch of one process."
        )
    if processes > 1 and not config.even_batches:
        raise UserError(
            f"training.accelerator_config.even_batches=False: of {processes} processes, those with a batch more would "
            "wait for the others without end. Remove it."
        )


def _choose(value: Any, known: Iterable[Any]) -> str:
    names = [str(name) for name in known]
    return did_you_mean(value, names) or (f"Choose from {', '.join(names)}." if names else "Remove it.")


def _short(value: Any) -> str:
    return repr(getattr(value, "value", value))
