"""Fine-tuning of a sparse model on two gloo ranks, started by `test_kept.py` under torchrun: DDP and FSDP2."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ast_sparse import (
    BasisConfig,
    KeepSparsityCallback,
    SparsityConfig,
    UserError,
    change_basis,
    check_nm,
    export_model,
    flip_rate,
    keep_sparsity,
    merge_adapter_sparse,
    sparsify_model,
)
from ast_sparse.distributed.pieces import whole
from ast_sparse.sparsity.masks import Pattern
from tests.distributed.fsdp_facts import data
from tests.export.sparse_models import plain_sparse_model

STEPS, BATCH = 3, 4


def plain(family: str = "llama") -> PreTrainedModel:
    return plain_sparse_model(family).double()


def by_trainer(out: Path, world: int) -> PreTrainedModel:
    model = plain()
    args = TrainingArguments(
        str(out), max_steps=STEPS, per_device_train_batch_size=BATCH // world, learning_rate=3e-3, use_cpu=True,
        weight_decay=0.1, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    Trainer(model, args, train_dataset=data(), callbacks=[KeepSparsityCallback()]).train()
    return model


def by_hand(model: nn.Module, rank: int, world: int) -> None:
    """A loop without Trainer; `model` may be sharded."""
    kept = keep_sparsity(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    ids = torch.tensor(data()["input_ids"][:BATCH])[rank::world]
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        kept.apply()
        optimizer.zero_grad()
    kept.check()
    kept.settle()
    kept.remove()


def sharded(model: Any) -> Any:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def asked_of_pieces() -> dict[str, Any]:
    """What is said of a weight whose first piece is zero and whose second is dense."""
    weight = (torch.arange(4) >= 2).float()[:, None].expand(4, 8)
    pieces = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)])
    return {
        "check_nm": check_nm(pieces, 2, 4),
        "quarter": Pattern(1, 4, structured=False).holds(pieces),
        "flip_rate": flip_rate(pieces != 0, pieces != pieces),
    }


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def sharded_with_adapter() -> Any:
    model = get_peft_model(plain(), LoraConfig(target_modules="all-linear", r=2))
    sharded(model.get_base_model())
    return model


def main(out: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ddp = by_trainer(out / "ddp", world).state_dict()
    model = sharded(plain())
    by_hand(model, rank, world)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    fsdp = {name: whole(p.detach()) for name, p in model.named_parameters()}
    half = plain()
    for layer in keep_sparsity(half).layers.values():  # without groups, and not half of each piece
        weight = layer.weight.detach()
        weight.copy_((torch.arange(len(weight)) < len(weight) / 2)[:, None].expand_as(weight))
    unstructured = len(keep_sparsity(sharded(half), "unstructured").layers)
    conv1d = plain("gpt2")
    for block in conv1d.transformer.h:
        fully_shard(block)
    refusal = refused(lambda: keep_sparsity(conv1d))
    refusals = [refused(call) for call in (
        lambda: sparsify_model(model, SparsityConfig()),
        lambda: change_basis(model, BasisConfig(), Pattern(2, 4), torch.arange(32).view(2, 16)),
        lambda: export_model(model, out / "export"),
        lambda: merge_adapter_sparse(sharded_with_adapter()),
    )]  # fmt: skip
    facts = {
        "ddp": ddp, "fsdp": fsdp, "refusal": refusal, "refusals": refusals, "unstructured": unstructured,
        "pieces": asked_of_pieces(),
    }  # fmt: skip
    if rank == 0:
        torch.save(facts, out / "facts.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
