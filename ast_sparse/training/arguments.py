"""Settings of `TrainingArguments` that AST would ignore or break: refused by name."""

import dataclasses
from typing import Any

from transformers import TrainingArguments

from ast_sparse.errors import UserError

# field: why, and the mend; refused whenever it is not at its default
_REFUSED = {
    "optim": "AST trains with its own SparseAdamW. Remove it; set adam_beta1, adam_beta2, adam_epsilon, weight_decay.",
    "optim_args": "AST trains with its own SparseAdamW. Remove it.",
    "optim_target_modules": "AST trains with its own SparseAdamW. Remove it.",
    "deepspeed": "DeepSpeed shards weights where masks cannot follow. Remove it; use DDP (torchrun).",
    "fsdp": "sharded training is not supported yet. Remove it; use DDP (torchrun).",
    "label_smoothing_factor": "the distillation loss has no label smoothing. Remove it.",
    "use_liger_kernel": "Liger replaces the loss that AST computes itself. Remove it.",
    "bf16_full_eval": "it would turn the float32 master weights into bf16. Remove it; bf16 covers evaluation too.",
    "fp16_full_eval": "it would turn the float32 master weights into fp16. Remove it; fp16 covers evaluation too.",
    "parallelism_config": "tensor and context parallelism cut the groups of a mask. Remove it; use DDP (torchrun).",
    "auto_find_batch_size": "a batch size that changes makes a run unrepeatable. Set per_device_train_batch_size.",
}


def build_arguments(values: dict[str, Any], output_dir: str) -> TrainingArguments:
    """`TrainingArguments(**values)` with its errors as one line each.

    Raises:
        UserError: TrainingArguments refuses a value, or AST would ignore a setting.
    """
    try:
        args = TrainingArguments(**{**values, "output_dir": output_dir})
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        message = " ".join(str(error).split())
        named = next((key for key in values if key in message), None)
        where = f"training.{named}={values[named]!r}" if named else "training"
        raise UserError(f"{where}: {message}") from None
    check_arguments(args)
    return args


def check_arguments(args: TrainingArguments) -> None:
    """Raise UserError for a setting that this trainer would ignore."""
    for item in dataclasses.fields(args):
        value = getattr(args, item.name)
        if item.name in _REFUSED and value != item.default and value not in (None, False, [], {}, ""):
            raise UserError(f"training.{item.name}={_short(value)}: {_REFUSED[item.name]}")
    if args.push_to_hub and args.hub_strategy not in ("end",):
        raise UserError(
            f"training.hub_strategy={_short(args.hub_strategy)} would upload weights that are not masked yet. "
            "Use hub_strategy: end."
        )
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel does not carry masks. Start with "
            "`torchrun --nproc_per_node` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0."
        )


def _short(value: Any) -> str:
    return repr(getattr(value, "value", value))
