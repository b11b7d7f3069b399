"""How gradients are reduced over the processes: when under FSDP2, and into which memory under DDP."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ast_sparse.storage.model_kind import without_cache

_SYNC = "sync_each_batch"  # of accelerate's settings for accumulation


def reduce_every_batch(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Let FSDP2 reduce gradients after every micro-batch, unless `training.accelerator_config` says otherwise.

    Without this each process keeps whole gradients in float32, 4 bytes a parameter, until the last micro-batch.
    """
    given = args.accelerator_config.gradient_accumulation_kwargs or {}  # type: ignore[union-attr]
    if _SYNC not in given:
        accelerator.gradient_state.plugin_kwargs[_SYNC] = True


@contextmanager
def accumulation_kept(args: TrainingArguments) -> Iterator[None]:
    """Inside, Trainer has a copy of the settings for accumulation, because it writes into them.

    With its entry they would differ from what a resumed run is given, and a second trainer would refuse them.
    """
    config = cast(AcceleratorConfig, args.accelerator_config)
    given = config.gradient_accumulation_kwargs
    if given is not None:
        config.gradient_accumulation_kwargs = {key: value for key, value in given.items() if key != "num_steps"}
    try:
        yield
    finally:
        config.gradient_accumulation_kwargs = given


def reduce_over_replicas(model: nn.Module, is_last: bool) -> None:
    """Under hybrid sharding, sum gradients over the replicas only after the last micro-batch of a step.

    Each replica reduces its own gradients after every micro-batch, so that none are kept whole.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)


def prepare_ddp(accelerator: Accelerator, model: PreTrainedModel, args: TrainingArguments) -> None:
    """Set what DDP will be made with: gradients are views of its buckets, so that there is no second copy of them.

    DDP searches for unused parameters in every step only if there may be any (`may_leave_unused`) or if
    `training.ddp_find_unused_parameters` says so.
    """
    handler = accelerator.ddp_handler
    if handler is None or accelerator.num_processes == 1:
        return
    handler.gradient_as_bucket_view = True
    if args.ddp_find_unused_parameters is None:
        handler.find_unused_parameters = may_leave_unused(model)


def may_leave_unused(model: PreTrainedModel) -> bool:
    """Whether a step may give a trained parameter no gradient, for which DDP would wait.

    That is so if each expert is a module of its own, which may get no token; if layers are dropped at random; or if a
    parameter does not enter the logits at all, which a forward pass of two tokens shows.
    """
    experts = any(isinstance(module, nn.ModuleList) and "expert" in name for name, module in model.named_modules())
    drops = any(getattr(model.config, name, 0) for name in ("layerdrop", "decoder_layerdrop"))
    return experts or drops or bool(_outside_the_graph(model))


def _outside_the_graph(model: PreTrainedModel) -> set[Tensor]:
    """The trained parameters that the logits do not depend on."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    unused: set[Tensor] = {parameter for parameter in model.parameters() if parameter.requires_grad}
    was_training = model.training
    try:
        with torch.enable_grad():
            logits = cast(Tensor, model.eval()(input_ids=tokens, **without_cache(model)).logits)
    except Exception:  # from a model that cannot run on so little: any may be unused
        return unused
    finally:
        model.train(was_training)
    seen, nodes = set(), [logits.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        unused.discard(getattr(node, "variable", None))
        nodes += [parent for parent, _ in node.next_functions]
    return unused
