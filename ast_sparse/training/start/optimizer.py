"""The optimizer of a run: SparseAdamW, its groups of parameters, and the kernels of its updates."""

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ast_sparse.config import OptimizerConfig, SparsityConfig
from ast_sparse.distributed.ranks import any_rank
from ast_sparse.errors import UserError
from ast_sparse.kernels.choice import Kernels, choose_kernels
from ast_sparse.optim import SparseAdamW
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.sparsity.offload import OffloadedAdamW
from ast_sparse.sparsity.slorb import SLoRB


def parameter_groups(model: nn.Module, decaying: Collection[str]) -> dict[str, list[Tensor]]:
    """The trained parameters of a sparse model: masked, weight decay, no decay (norms, biases), SLoRB.

    Args:
        decaying: names of the parameters with weight decay.
    """
    masked = {layer.weight for layer in sparse_layers(model).values()}
    slorb = {p for module in model.modules() if isinstance(module, SLoRB) for p in module.parameters()}
    groups: dict[str, list[Tensor]] = {"masked": [], "decay": [], "no_decay": [], "slorb": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter in masked:
            groups["masked"].append(parameter)
        elif parameter in slorb:
            groups["slorb"].append(parameter)
        else:
            groups["decay" if name in decaying else "no_decay"].append(parameter)
    return groups


def sparse_adamw(
    model: nn.Module,
    decaying: Collection[str],
    args: TrainingArguments,
    config: SparsityConfig,
    optimizer_config: OptimizerConfig | None = None,
) -> SparseAdamW:
    """SparseAdamW over four groups: masked, weight decay, no decay (norms, biases), SLoRB (never decays).

    Args:
        decaying: names of the parameters with weight decay.

    Raises:
        UserError: no parameter is trained.
    """
    trained = {name: found for name, found in parameter_groups(model, decaying).items() if found}
    if not trained:
        raise UserError(
            "All parameters of the model are frozen (requires_grad=False), as PEFT leaves a merged model. Call "
            "`model.requires_grad_(True)` before SparseTrainer gets it."
        )
    decays, settings = {"masked", "decay"}, optimizer_config or OptimizerConfig()
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    made = partial(OffloadedAdamW, half=half) if settings.offload else partial(SparseAdamW, moments=settings.moments)
    return made(
        [
            {
                "params": parameters,
                "weight_decay": args.weight_decay if name in decays else 0.0,
                "is_masked": name == "masked",
            }
            for name, parameters in trained.items()
        ],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        # without mask decay, `gradient` is plain AdamW, which IMP and GMP train with
        decay_placement="gradient" if config.is_gradual else config.decay_placement,
        decay_norm=config.decay_norm,
    )


def kernels_of_run(
    sparsity: SparsityConfig, optimizer: OptimizerConfig, weights: int, args: TrainingArguments, stored: Kernels | None
) -> Kernels:
    """The kernels of a run; eager on all ranks if one cannot compile, because their weights must stay equal.

    Args:
        weights: number of masked weights.
        stored: the choice in the checkpoint that is resumed.

    Raises:
        UserError: `compiled` is asked for, but compiling fails here.
    """
    device = torch.device("cpu") if optimizer.offload else args.device  # where weights are updated
    choice = choose_kernels(sparsity.kernels, weights, device, stored)
    return "eager" if any_rank(choice == "eager", args.device) else choice
