"""Checks of what SparseTrainer is given, before training: models, their vocabularies, an optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ast_sparse.config import OptimizerConfig, SparsityConfig
from ast_sparse.data.tokens.vocabulary import Renamed, check_teacher_tokens, check_text_tokens, renamed_tokens
from ast_sparse.errors import UserError
from ast_sparse.kernels import moments8bit
from ast_sparse.optim import SparseAdamW
from ast_sparse.sparsity.select import refuse_adapter
from ast_sparse.storage.locate import load_tokenizer
from ast_sparse.storage.model_kind import check_direction, check_outputs
from ast_sparse.training.fsdp import sharding_plugin

_UNTAUGHT = "untaught"  # an entry of a batch


def check_unwrapped(model: Any) -> None:
    """Raise UserError for what is not a model of transformers, or is one inside PEFT or torch.compile."""
    refuse_adapter(model)
    if hasattr(model, "_orig_mod"):
        raise UserError(
            "model is wrapped by torch.compile. Pass the model itself, and set torch_compile=True in TrainingArguments."
        )
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model is {type(model).__name__}. Pass a causal LM of transformers, or the name of one.")


def check_own_forward(model: nn.Module, teacher: nn.Module, given: str = "model") -> None:
    """Raise UserError if a copy as teacher would call a function that may run the modules of the model.

    A deep copy has its own methods, but the same functions: `model.forward = torch.compile(model.forward)`.

    Args:
        teacher: a copy of `model`.
        given: the argument that the model is: `model` or `teacher_model`.
    """
    whose, fix = "the teacher, a copy,", "pass another teacher_model"
    if given != "model":
        whose, fix = "a copy in the dtype of the run", "pass a teacher_model in that dtype"
    for (name, ours), theirs in zip(model.named_modules(), teacher.modules(), strict=True):
        forward = vars(ours).get("forward")
        if forward is not None and forward is vars(theirs).get("forward"):
            where = f"{given}.{name}".removesuffix(".") + ".forward"
            raise UserError(
                f"`{where}` was replaced by a function, which {whose} would call too; it may run {given} itself. "
                f"Delete it (torch_compile=True in TrainingArguments compiles), or {fix}."
            )


def check_model(model: PreTrainedModel) -> None:
    """Raise UserError for a model that cannot be called or sees later tokens, half-precision weights, or a loss that is
    not part of (4)."""
    check_outputs(model)
    check_direction(model.config, type(model).__name__)
    if getattr(model.config, "output_router_logits", False):
        raise UserError(
            "config.output_router_logits=True asks for the router's auxiliary loss, which is not part of (4). "
            "Set it to False."
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64) and parameter.is_floating_point():
            raise UserError(
                f"`{name}` is {parameter.dtype}: half-precision master weights lose the mask decay and small steps. "
                "Load the model with dtype=torch.float32, and set bf16=True in TrainingArguments for speed."
            )


def check_recomputing(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Raise UserError if activations cannot be computed again in the backward pass, as the run asks for."""
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"training.gradient_checkpointing=True: {type(model).__name__} does not support it. Set it to false."
        )


def check_replaced(optimizer: torch.optim.Optimizer | None, given: Mapping[str, Any], args: TrainingArguments) -> None:
    """Raise UserError for what would replace SparseTrainer's own: an optimizer without masks, a loss, a model.

    In a sharded run that is any optimizer.
    """
    if optimizer is not None and not isinstance(optimizer, SparseAdamW):
        raise UserError(
            f"optimizers[0] is {type(optimizer).__name__}, which does not support masks. Pass a SparseAdamW, or None."
        )
    if optimizer is not None and sharding_plugin(args) is not None:
        raise UserError(
            "optimizers[0] has whole parameters, and FSDP2 puts pieces in their place. Pass None: SparseTrainer builds "
            "its own SparseAdamW from the pieces."
        )
    if given.get("model_init") is not None:
        raise UserError(
            "model_init would be ignored: a SparseTrainer makes one model sparse, in place. Pass it as `model`; in a "
            "search over settings, make a trainer for each trial."
        )
    for name in ("compute_loss_func", "optimizer_cls_and_kwargs"):
        if given.get(name) is not None:
            raise UserError(f"{name} would be ignored: SparseTrainer has its own loss and optimizer. Remove it.")


def check_optimizer_settings(
    config: OptimizerConfig,
    args: TrainingArguments,
    optimizer: torch.optim.Optimizer | None = None,
    processes: int | None = None,
    sparsity: SparsityConfig | None = None,
) -> None:
    """Refuse settings of the optimizer that do not work in this run.

    Args:
        optimizer: one built by the user.
        processes: of the run; default: those of `args`.

    Raises:
        UserError: a setting does not fit the optimizer, the processes or torch.compile, or a package is missing.
    """
    named = "optimizer.offload=True" if config.offload else f"optimizer.moments={config.moments!r}"
    if config == OptimizerConfig():
        return
    if optimizer is not None:
        raise UserError(f"{named} would be ignored: optimizers[0] has its own settings. Remove one of them.")
    if sharding_plugin(args) is not None:
        raise UserError(f"{named} does not work with FSDP2, which shards the state over the GPUs. Remove one of them.")
    processes = args.world_size if processes is None else processes
    if config.offload and processes > 1:
        raise UserError(
            f"{named} is for a single process, and this run has {processes}, each of which would keep all weights "
            "in host memory. Remove it; set training.fsdp=true."
        )
    if config.offload and args.torch_compile:
        raise UserError(f"{named} does not work with training.torch_compile=True. Remove one of them.")
    if config.offload and sparsity is not None and sparsity.forward == "dense":
        raise UserError(f"{named} keeps masked weights on the device: not with sparsity.forward=dense. Remove one.")
    if config.moments == "8bit" and not moments8bit.is_installed():
        raise UserError(f"{named} needs torchao. Install it (`pip install 'ast-sparse[8bit]'`), or set float32.")


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: PreTrainedModel) -> None:
    """Raise UserError unless an optimizer built by the user has every trained parameter, SLoRB's included."""
    if optimizer is None:
        return
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in held:
            raise UserError(
                f"optimizers[0] does not have `{name}`, which would never be trained. Pass None: SparseTrainer builds "
                "its own SparseAdamW."
            )


def check_vocabularies(
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[str | None, Renamed]:
    """Check that the KL compares the same tokens in both output distributions; the teacher's tokenizer comes with it.

    Args:
        tokenizer: of the student; None: the one stored with its weights.
        name: of the teacher, if it is not the one in its configuration.
        trust_remote_code: run code that comes with a tokenizer.

    Returns:
        A line to print, as in `check_teacher_tokens`, and the tokens that text must not have, as in `renamed_tokens`.

    Raises:
        UserError: as in `check_teacher_tokens`.
    """
    name = name or str(teacher.name_or_path)
    named = f"model.teacher {name!r}"
    rows, teacher_rows = (config.get_text_config().vocab_size for config in (student, teacher))
    if tokenizer is None:
        tokenizer = find_tokenizer(student.name_or_path, trust_remote_code)
    else:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    other = find_tokenizer(name, trust_remote_code)
    note = check_teacher_tokens(tokenizer, other, rows, teacher_rows, named)
    return note, renamed_tokens(tokenizer, other)


def check_taught(
    tokens: torch.Tensor, student: PreTrainedConfig, teacher: PreTrainedConfig, renamed: Renamed | None = None
) -> None:
    """Raise UserError for a token that a teacher with a smaller vocabulary has no embedding for.

    Args:
        renamed: tokens that mean something else to the teacher; they raise UserError too.
    """
    check_text_tokens(tokens, renamed or {}, f"model.teacher {str(teacher.name_or_path)!r}")
    rows = teacher.get_text_config().vocab_size
    if rows < student.get_text_config().vocab_size and (largest := int(tokens.max())) >= rows:
        raise UserError(
            f"The training text has the token {largest}, and model.teacher {str(teacher.name_or_path)!r} has {rows} "
            "embeddings. Leave out text with tokens that were added to the student, or choose another teacher."
        )


class TaughtCollator:
    """A collator that also checks that the teacher knows the tokens of a batch, while they are in host memory.

    It may run ahead of training, or in a worker, so it does not raise: the batch gets a text as `untaught`, and
    `raise_untaught` raises it when the batch is trained on.

    Args:
        collator: makes the batches.
        student, teacher, renamed: as for `check_taught`.

    Attributes:
        raises: it raises at once, because one process makes the batches of all and joins them, where the text would
            be lost.
    """

    raises = False

    def __init__(
        self, collator: Any, student: PreTrainedConfig, teacher: PreTrainedConfig, renamed: Renamed | None
    ) -> None:
        self._collator, self._models, self._renamed = collator, (student, teacher), renamed

    def __call__(self, rows: Any) -> Any:
        batch = self._collator(rows)
        try:
            check_taught(batch["input_ids"], *self._models, self._renamed)
        except UserError as error:
            if self.raises:
                raise
            batch[_UNTAUGHT] = str(error)
        return batch


def raising_if_joined(loader: DataLoader[Any], collator: Any, processes: int) -> DataLoader[Any]:
    """The loader; its `TaughtCollator`, if it has one, raises at once where batches of several processes are joined."""
    if isinstance(collator, TaughtCollator):
        collator.raises = isinstance(loader, DataLoaderDispatcher) and processes > 1
    return loader


def raise_untaught(batch: Mapping[str, Any]) -> None:
    """Raise UserError if a batch of `TaughtCollator` has a token that the teacher does not know."""
    if _UNTAUGHT in batch:
        raise UserError(batch[_UNTAUGHT])


def find_tokenizer(name_or_path: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model, or None if it has none that can be read."""
    try:
        return load_tokenizer(name_or_path, trust_remote_code=trust_remote_code) if name_or_path else None
    except UserError:
        return None
