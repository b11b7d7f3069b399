"""Keys of `training` that older versions of transformers, or TRL, had, and what to write instead.

`{value}` is the value in the file. A test compares every key with the installed `TrainingArguments`.
"""

from typing import Any

from ast_sparse.errors import shown, shown_name

_HALF = "Remove it; bf16: true (or fp16: true) trains in half precision."
_TPU = "Remove it; ast-train does not run on TPUs."
_NEVER = "Remove it; it has no effect on ast-train."
_ONE_LENGTH = "all blocks have the same length, data.block_size."

# key: (settings that the hint names, the hint)
REMOVED: dict[str, tuple[tuple[str, ...], str]] = {
    "warmup_ratio": (("training.warmup_steps",), "Write warmup_steps: {value}; below 1 it is a share of the steps."),
    "group_by_length": (
        ("data.block_size", "training.train_sampling_strategy"),
        f"Remove it; {_ONE_LENGTH} transformers has train_sampling_strategy: group_by_length for it now.",
    ),
    "evaluation_strategy": (("training.eval_strategy",), "Write eval_strategy: {value}."),
    "overwrite_output_dir": ((), "Remove it; start with --overwrite, or continue with --resume."),
    "per_gpu_train_batch_size": (
        ("training.per_device_train_batch_size",), "Write per_device_train_batch_size: {value}.",
    ),
    "per_gpu_eval_batch_size": (
        ("training.per_device_eval_batch_size",), "Write per_device_eval_batch_size: {value}.",
    ),
    "no_cuda": (("training.use_cpu",), "Write use_cpu: {value}."),
    "use_mps_device": (("training.use_cpu",), "Remove it; MPS is used if it is available, unless use_cpu: true."),
    "logging_dir": (
        ("training.report_to",),
        "Remove it; with report_to: tensorboard set the environment variable TENSORBOARD_LOGGING_DIR.",
    ),
    "save_safetensors": ((), "Remove it; weights are always saved as safetensors."),
    "jit_mode_eval": ((), _NEVER),
    "use_ipex": ((), _NEVER),
    "use_legacy_prediction_loop": ((), _NEVER),
    "past_index": ((), _NEVER),
    "mp_parameters": ((), _NEVER),
    "ray_scope": ((), _NEVER),
    "fp16_backend": (("training.bf16", "training.fp16"), _HALF),
    "half_precision_backend": (("training.bf16", "training.fp16"), _HALF),
    "fp16_opt_level": (("training.bf16", "training.fp16"), _HALF),
    "tpu_num_cores": ((), _TPU),
    "tpu_metrics_debug": ((), _TPU),
    "adafactor": (
        ("training.adam_beta1", "training.adam_beta2"),
        "Remove it; AST trains with its own SparseAdamW (adam_beta1, adam_beta2).",
    ),
    "include_inputs_for_metrics": (
        ("training.include_for_metrics",), "Remove it, or write include_for_metrics: [inputs].",
    ),
    "include_tokens_per_second": ((), "Remove it; tokens per second are always logged."),
    "push_to_hub_model_id": (("training.hub_model_id",), "Write hub_model_id: {value}."),
    "push_to_hub_organization": (
        ("training.hub_model_id",), "Write the organization into hub_model_id: ORGANIZATION/NAME.",
    ),
    "push_to_hub_token": (("training.hub_token",), "Write hub_token, or log in with `hf auth login`."),
    "fsdp_min_num_params": (
        ("training.fsdp_config",), "Write fsdp_config: {{min_num_params: {value}}}.",
    ),
    "fsdp_transformer_layer_cls_to_wrap": (
        ("training.fsdp_config",), "Write fsdp_config: {{transformer_layer_cls_to_wrap: {value}}}.",
    ),
    "sharded_ddp": (("training.fsdp",), "Remove it; set fsdp: true (FSDP2)."),
    "xpu_backend": (("training.ddp_backend",), "Write ddp_backend: {value}."),
    "torchdynamo": (("training.torch_compile_backend",), "Write torch_compile_backend: {value}."),
    "split_batches": (
        ("training.per_device_train_batch_size",),
        "Remove it; per_device_train_batch_size is the batch of one process.",
    ),
    "dispatch_batches": (("training.accelerator_config",), "Write accelerator_config: {{dispatch_batches: {value}}}."),
    # of TRL's SFTConfig
    "max_seq_length": (("data.block_size",), "Write data.block_size: {value}."),
    "max_length": (("data.block_size",), "Write data.block_size: {value}."),
    "dataset_text_field": (("data.text_field",), "Write data.text_field: {value}."),
    "packing": (("data.packing",), "Remove it; text is always packed, and data.packing says how."),
}  # fmt: skip
_SECRET = ("push_to_hub_token",)


def removed_hint(key: Any, value: Any) -> str | None:
    """The error for a key that no longer exists, with the fix; None for any other key."""
    if not isinstance(key, str) or key not in REMOVED:
        return None
    written = "true" if value is True else "false" if value is False else shown_name(value)
    given = "" if key in _SECRET else f"={shown(value)}"
    return f"training.{key}{given}: transformers 5 has no such key. {REMOVED[key][1].format(value=written)}"
