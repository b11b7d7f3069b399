"""What two gloo ranks that hold the same weights do; `empty_facts.py` calls this under torchrun."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from ast_sparse import SparsityConfig
from ast_sparse.distributed.mesh import process_grid
from ast_sparse.distributed.pieces import local
from ast_sparse.errors import SharedError, UserError
from ast_sparse.sparsity.model import refresh_masks, sparse_layers, sparsify_model
from tests.models import tiny_model
from tests.training.small_runs import blocks, trainer

FAULTY = "model.layers.1.mlp.up_proj"
INTERVAL = 2


class Gradients(TrainerCallback):
    """How many blocks of memory the gradients of a step lie in."""

    memories = tensors = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        self.tensors, self.memories = len(grads), len({grad.untyped_storage().data_ptr() for grad in grads})


class Fault(TrainerCallback):
    """Another weight on the second rank before the second refresh."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == 2 * INTERVAL - 1:
            damage(kwargs["model"])


@torch.no_grad()
def damage(model: Any) -> None:
    """Exchange what is kept and pruned in the last group of a layer."""
    layer = model.get_submodule(FAULTY)
    weight, mask = local(layer.weight)[-1, -4:], local(layer.mask)[-1, -4:]
    weight.copy_(torch.where(mask, 0, 1))


def digest(model: torch.nn.Module) -> str:
    """Of all bits of weights and masks."""
    tensors = model.state_dict().values()
    return sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def under_ddp(folder: Path, evaluates_first: bool = False, **args: Any) -> dict[str, Any]:
    AcceleratorState._reset_state()
    sparsity = SparsityConfig(mask_interval=INTERVAL, mask_decay=1e-2)
    run = trainer(folder, sparsity=sparsity, eval_dataset=blocks(3, seed=1), args=args)
    grads = Gradients()
    run.add_callback(grads)
    if evaluates_first:
        run.evaluate()
        run.predict(blocks(3, seed=2))
    run.train()
    ddp = run.model_wrapped
    return {
        "searches": ddp.find_unused_parameters,
        "views": [ddp.gradient_as_bucket_view, grads.memories, grads.tensors],
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "weights": digest(run.student),
    }


def streamed(folder: Path) -> dict[str, Any]:
    """Losses of held-out rows without a length, which one process reads for both, and of the same with one."""
    AcceleratorState._reset_state()
    run = trainer(folder, args={"per_device_eval_batch_size": 2})
    found: dict[str, Any] = {}
    for count in (1, 5, 7, 8):
        rows = blocks(count, seed=1)
        losses = (run.evaluate(each)["eval_loss"] for each in (rows.to_iterable_dataset(), rows))
        found[str(count)] = list(losses)
    run.args.accelerator_config.dispatch_batches = False
    run.accelerator.dataloader_config.dispatch_batches = False
    stream = rows.to_iterable_dataset()
    makes = [
        lambda: run.evaluate(stream),
        lambda: trainer(folder, eval_dataset=stream, args={"accelerator_config": {"dispatch_batches": False}}),
    ]
    for make in makes:
        try:
            make()
        except UserError as error:
            found.setdefault("refused", []).append(str(error))
    return found


def stopped(folder: Path) -> str:
    AcceleratorState._reset_state()
    run = trainer(folder, sparsity=SparsityConfig(mask_interval=INTERVAL, mask_decay=1e-2))
    run.add_callback(Fault())
    try:
        run.train()
    except SharedError as error:
        return f"after step {run.state.global_step}: {error}"
    return "not stopped"


def replicas(rank: int) -> dict[str, Any]:
    """Refreshes of a model of two replicas, each on one process, and of a plain one."""
    found: dict[str, Any] = {}
    for name in ("plain", "replicas"):
        model = tiny_model()
        sparsify_model(model, SparsityConfig())
        if name == "replicas":
            fully_shard(model, mesh=process_grid("cpu", 2, 1))
        with torch.no_grad():
            for layer in sparse_layers(model).values():
                local(layer.weight).copy_(local(layer.weight).roll(1, dims=1))
        found[name] = refresh_masks(model, step=None if name == "plain" else 1)
    if rank == 1:
        damage(model)
    try:
        refresh_masks(model, step=7)
    except SharedError as error:
        found["stopped"] = str(error)
    return found


def facts(root: Path) -> dict[str, Any]:
    return {
        "ddp": under_ddp(root / "views"),
        "accumulated": under_ddp(root / "views", gradient_accumulation_steps=2, max_steps=3),
        "evaluated first": under_ddp(root / "views", evaluates_first=True),
        "streamed": streamed(root / "streamed"),
        "stopped": stopped(root / "stopped"),
        "replicas": replicas(torch.distributed.get_rank()),
    }
