"""Runs of FSDP2 on gloo ranks, started by `test_fsdp.py` under torchrun; the results are written to a JSON file.

Every run has a twin in one process, made by the same functions.
"""

import copy
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments

from ast_sparse import DistillationConfig, SLoRBConfig, SparseTrainer, SparsityConfig
from ast_sparse.distributed.pieces import local, piece_for, reshard, unwrapped_name
from ast_sparse.errors import SharedError
from ast_sparse.run.preemption import PreemptionCallback
from ast_sparse.run.signals import Preempted, preemption_signals
from ast_sparse.sparsity.masks import nm_mask
from ast_sparse.sparsity.model import sparse_layers, sparsify_model
from ast_sparse.training.fsdp import without_weights
from ast_sparse.training.resume.fingerprints import weights_fingerprint
from ast_sparse.training.sharding import allocate_pieces, shard_student
from tests.distributed import stage_facts
from tests.distributed.block_settings import block_settings
from tests.models import tiny_config, tiny_model

RANKS = 3  # 32, 48 and 16 rows: no layer can be split evenly
BATCH = 6


def data(rows: int = 48, seed: int = 3) -> Dataset:
    ids = torch.randint(0, 128, (rows, 16), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def few_rows() -> Any:
    """A model whose k_proj and v_proj have two rows, so that the third rank has none of them."""
    config = tiny_config("llama")
    config.num_key_value_heads, config.head_dim = 1, 2
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def sharded_first(out: Path, config: SparsityConfig, world: int, **values: Any) -> Any:
    """A trainer whose model was sharded without weights, got its rows and ran while it was dense; `few_rows`."""
    if world == 1:
        return make(out, config, 1, model=few_rows(), **values)
    whole = few_rows().double()
    model = without_weights(whole)
    compares_maps = "kind" in values  # for which the trainer sets another attention; not with recomputation
    fsdp: dict[str, Any] = {"fsdp": True, "fsdp_config": {"activation_checkpointing": not compares_maps}}
    shard_student(model, TrainingArguments(str(out), use_cpu=True, **fsdp))
    allocate_pieces(model, torch.device("cpu"))
    stored = whole.state_dict()
    with torch.no_grad():  # a dense model that is measured first
        for name, parameter in model.named_parameters():
            local(parameter).copy_(piece_for(stored[unwrapped_name(name)], parameter))
        ids = torch.tensor(data()["input_ids"][:2])
        torch.testing.assert_close(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert weights_fingerprint(model) == weights_fingerprint(whole)
    return make(out, config, world, model=model, teacher=whole, **fsdp, **values)


def make(
    out: Path, sparsity: SparsityConfig, world: int, *, model: Any = None, kind: str = "kl", slorb: Any = None,
    dtype: torch.dtype = torch.float64, teacher: Any = None, **args: Any,
) -> Any:  # fmt: skip
    """A trainer of a tiny model, its batch split over the ranks."""
    model = (model or tiny_model("llama")) if teacher is not None else (model or tiny_model("llama")).to(dtype)
    accumulate, batch = args.pop("gradient_accumulation_steps", 1), args.pop("batch", BATCH)
    values: dict[str, Any] = dict(
        max_steps=6, per_device_train_batch_size=batch // world // accumulate, gradient_accumulation_steps=accumulate,
        learning_rate=3e-3, use_cpu=True, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
        fsdp=world > 1, fsdp_config={"reshard_after_forward": kind != "mobilebert"} if world > 1 else None,
    )  # fmt: skip
    return SparseTrainer(
        model,
        TrainingArguments(str(out), **{**values, **args}),
        sparsity_config=sparsity,
        distillation_config=DistillationConfig(kind=kind),
        slorb_config=slorb,
        teacher_model=teacher,
        train_dataset=data(),
        eval_dataset=data(7, seed=5),
    )


RUNS: dict[str, Callable[[Path, int], Any]] = {
    "accumulated, SLoRB": lambda out, world: make(
        out, SparsityConfig(mask_interval=0), world, slorb=SLoRBConfig(k=16),
        gradient_accumulation_steps=BATCH // RANKS,
    ),
    "head not tied": lambda out, world: make(out, SparsityConfig(mask_interval=0), world, model=tiny_model("mistral")),
    "fewer rows than ranks": lambda out, world: make(
        out, SparsityConfig(mask_interval=2, mask_decay=1e-2), world, model=few_rows(), slorb=SLoRBConfig(k=8)
    ),
    "tinybert": lambda out, world: make(out, SparsityConfig(mask_interval=0), world, kind="tinybert"),
    "mobilebert": lambda out, world: make(out, SparsityConfig(mask_interval=0), world, kind="mobilebert"),
    "recomputed": lambda out, world: make(
        out, SparsityConfig(mask_interval=0), world,
        **({"fsdp_config": {"activation_checkpointing": True}} if world > 1 else {}),
    ),
    "moving": lambda out, world: make(  # an evaluation, even the last one, leaves its blocks whole
        out, SparsityConfig(mask_interval=2, mask_decay=1e-2), world, eval_strategy="steps", eval_steps=3,
        **({"fsdp_config": {"reshard_after_forward": False}} if world > 1 else {}),
    ),
    "wanda": lambda out, world: make(out, SparsityConfig(mask_interval=3, criterion="wanda"), world),
    "unstructured": lambda out, world: make(out, SparsityConfig(mask_interval=3, pattern="unstructured"), world),
    "gmp": lambda out, world: make(out, SparsityConfig(schedule="gmp", mask_interval=2), world),
    "sharded first": lambda out, world: sharded_first(
        out, SparsityConfig(mask_interval=2, mask_decay=1e-2), world, slorb=SLoRBConfig(k=8)
    ),
    "sharded first, unstructured": lambda out, world: sharded_first(
        out, SparsityConfig(mask_interval=3, pattern="unstructured"), world, kind="tinybert"
    ),
    "late SLoRB": lambda out, world: make(
        out, SparsityConfig(mask_interval=0), world, slorb=SLoRBConfig(k=16, start=0.5)
    ),
}  # fmt: skip


def found(run: Any) -> dict[str, Any]:
    """Losses, flip rates and sparsities of a finished run, and its masks from all ranks."""
    log = run.state.log_history
    student = run.whole_student()
    masks = {} if student is None else {name: layer.mask for name, layer in sparse_layers(student).items()}
    return {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "flip rates": [entry["flip_rate"] for entry in log if "flip_rate" in entry],
        "sparsities": [entry["sparsity"] for entry in log if "sparsity" in entry],
        "masks": {name: mask.to(torch.uint8).flatten().tolist() for name, mask in masks.items()},
    }


class Logits:
    """How many times the student returned logits in training."""

    def __init__(self, run: Any) -> None:
        self.made = self.calls = 0
        run.student.register_forward_hook(self._see)

    def _see(self, module: Any, args: Any, output: Any) -> None:
        if module.training:
            self.calls += 1
            self.made += output["logits"] is not None


class MasksFit(TrainerCallback):
    """Whether, after a refresh, this rank's piece of every mask equals that of the whole weight's mask."""

    def __init__(self) -> None:
        self.fits: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 2 == 0:
            layers = sparse_layers(kwargs["model"]).values()
            whole = [(layer.weight.full_tensor(), layer.mask.full_tensor()) for layer in layers]
            self.fits.append(all(torch.equal(nm_mask(weight.abs()), mask) for weight, mask in whole))


class WholeGradients(TrainerCallback):
    """Bytes of gradients of whole parameters that this rank keeps between micro-batches, at most."""

    most = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        modules = [module for module in kwargs["model"].modules() if isinstance(module, FSDPModule)]
        groups = {group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups}
        parameters = [each for group in groups for each in group.fsdp_params]
        kept = [each.unsharded_accumulated_grad for each in parameters]  # in another dtype than the parameter
        kept += [each.unsharded_param.grad for each in parameters]
        self.most = max(self.most, sum(grad.nbytes for grad in kept if grad is not None))


def accumulated(out: Path) -> dict[str, list[Any]]:
    """Bytes of whole gradients, and losses, of a run that accumulates: by default, and reduced once a step."""
    found_by: dict[str, list[Any]] = {}
    once = {"gradient_accumulation_kwargs": {"sync_each_batch": False}}
    for name, args in (("by default", {}), ("once a step", {"accelerator_config": once})):
        run = make(out / name, SparsityConfig(mask_interval=0), RANKS, gradient_accumulation_steps=2, **args)
        watched = WholeGradients()
        run.add_callback(watched)
        run.train()
        found_by[name] = [watched.most, found(run)["losses"]]
    return found_by


def kinds(run: Any) -> dict[str, Any]:
    """What is sharded, and the dtypes that a bf16 run computes in."""
    seen: set[str] = set()
    layer = next(iter(sparse_layers(run.student).values()))
    handle = layer.register_forward_hook(lambda module, args, out: seen.update((str(args[0].dtype), str(out.dtype))))
    run.train()
    handle.remove()
    moments = next(iter(run.optimizer.optimizer.state.values()))
    tensors = {
        "weight": layer.weight, "mask": layer.mask, "start_mask": layer.start_mask, "S": layer.slorb.S,
        "X": layer.slorb.X, "moment": moments["exp_avg"], "teacher": run.teacher.model.layers[0].mlp.up_proj.weight,
    }  # fmt: skip
    kinds = {name: [isinstance(tensor, DTensor), str(tensor.dtype)] for name, tensor in tensors.items()}
    return {"tensors": kinds, "computed in": sorted(seen), "losses": found(run)["losses"]}


def half(out: Path, world: int) -> Any:
    """A trainer in bf16."""
    args = TrainingArguments(
        str(out), max_steps=6, use_cpu=True, bf16=True, fsdp=world > 1, report_to="none", disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=BATCH // world, learning_rate=3e-3, logging_steps=1,
    )  # fmt: skip
    return SparseTrainer(
        tiny_model("llama"),
        args,
        sparsity_config=SparsityConfig(mask_interval=0),
        distillation_config=DistillationConfig(),
        slorb_config=SLoRBConfig(k=16),
        train_dataset=data(),
    )


def gathers(half: bool, fixed: bool) -> dict[str, Any]:
    """Loss and gradients of a sharded sparse model beside those of the same model whole, and what it gathered.

    Only the first rank's tokens count, so no sum over ranks rounds.
    """
    whole = few_rows()
    sparsify_model(whole, SparsityConfig(init="magnitude", mask_interval=0 if fixed else 2), SLoRBConfig(k=8))
    model = copy.deepcopy(whole)
    if half:
        for parameter in whole.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
    shard_student(model, TrainingArguments("unused", use_cpu=True, fsdp=True, bf16=half))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    ids, first = torch.tensor(data()["input_ids"][:2]), float(os.environ["RANK"] == "0")
    sent: list[Tensor] = []
    # the name that FSDP2 calls, in torch 2.13 or before
    function = next(
        name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(torch.distributed, name)
    )
    gather = getattr(torch.distributed, function)

    def recorded(output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(input_tensor)
        return gather(output_tensor, input_tensor, *args, **kwargs)

    with mock.patch(f"torch.distributed.{function}", recorded), torch.no_grad():
        model(input_ids=ids)
    reshard(model)
    model.to("cpu")  # which gives each parameter new rows
    losses = [each(input_ids=ids, labels=ids).loss for each in (model, whole)]
    (losses[0] * first).backward()
    losses[1].backward()
    found, expected = dict(model.named_parameters()), dict(whole.named_parameters())
    trained = [name for name, parameter in expected.items() if parameter.requires_grad]
    grads = {name: found[name].grad.full_tensor() for name in trained}
    rows = [-(-parameter.shape[0] // RANKS) * parameter[0].numel() for parameter in map(expected.get, trained)]
    return {
        "bytes": sum(each.nbytes for each in sent) / sum(rows),
        "dtypes": sorted({str(each.dtype) for each in sent}),
        "loss": torch.equal(*losses),
        "unequal": [
            name for name in trained if not torch.equal(grads[name], expected[name].grad.to(grads[name].dtype))
        ],
        "masks": all(
            torch.equal(found[name].full_tensor(), mask) for name, mask in expected.items() if name.endswith("mask")
        ),
        "gradients of pruned": sum(
            int(grads[f"{name}.weight"][~layer.mask].count_nonzero()) for name, layer in sparse_layers(whole).items()
        ),
    }


def refused_for_space(out: Path) -> list[Any]:
    """A save that the file system refuses after a good one: the message, and the checkpoints that are left."""
    run = make(out, SparsityConfig(mask_interval=0), RANKS, save_strategy="steps", save_steps=3)

    class Full(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    run.add_callback(Full())
    run.remove_callback(PrinterCallback)  # the limit is on the file of this process's output too
    try:
        run.train()
    except SharedError as error:
        return [str(error), sorted(path.name for path in out.glob("checkpoint-*"))]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return ["no error", []]


BEST = dict(save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2, load_best_model_at_end=True)


def best(run: Any) -> dict[str, Any]:
    """The log of a run that ends with its best checkpoint, and the held-out loss before and after it."""
    before = run.evaluate()["eval_loss"]
    run.train()
    return {
        "best": [Path(run.state.best_model_checkpoint).name, run.state.best_metric],
        "before and after": [before, run.evaluate()["eval_loss"]],
        **found(run),
    }


class Asked(TrainerCallback):
    """A scheduler's signal that reaches one rank in the middle of a step."""

    def __init__(self, rank: int, step: int, number: signal.Signals) -> None:
        self.rank, self.step, self.number = rank, step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (args.process_index, state.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), self.number)


def preempted(out: Path) -> list[Any]:
    """The messages at the end of each part of a run that is preempted twice, and the losses of the whole run."""
    said: list[Any] = []
    for asked in (Asked(1, 2, signal.SIGUSR1), Asked(0, 3, signal.SIGTERM), None):
        run = make(out, SparsityConfig(mask_interval=2), RANKS)
        with preemption_signals() as signals:
            for callback in (asked, PreemptionCallback(signals, run.watch)):
                if callback is not None:
                    run.add_callback(callback)
            try:
                run.train(resume_from_checkpoint=bool(said))
            except Preempted as end:
                said.append(str(end))
    return [*said, found(run)["losses"]]


def main(out: Path) -> None:
    sys.dont_write_bytecode = True  # where the size of files is limited, Python would leave cut ones
    gc.collect()
    gc.freeze()  # Trainer collects garbage at every run, and what was imported takes half a second each time
    facts: dict[str, Any] = {}
    for name, build in RUNS.items():
        run = build(out / name, RANKS)
        fit, logits = MasksFit(), Logits(run)
        if name == "moving":
            run.add_callback(fit)
        run.train()
        facts[name] = {**found(run), **block_settings(run.student), "calls with logits": [logits.calls, logits.made]}
        if name == "moving":
            facts["masks fit"] = fit.fits
            run.save_model()
            run.export(out / "exported", format="compressed")
    facts["whole gradients"] = accumulated(out / "whole gradients")
    fixed = SparsityConfig(mask_interval=0)
    saved = make(out / "saved", fixed, RANKS, slorb=SLoRBConfig(k=16, start=0.5), save_strategy="steps", save_steps=2)
    saved.train()
    saved.save_model()
    facts["saved"] = found(saved)
    resumed = make(out / "plain", fixed, RANKS, slorb=SLoRBConfig(k=16, start=0.5))
    resumed.train(resume_from_checkpoint=str(out / "plain" / "checkpoint-2"))  # in one process
    facts["resumed from one process"] = found(resumed)
    resumed = make(out / "again", fixed, RANKS, slorb=SLoRBConfig(k=16, start=0.5))
    resumed.train(resume_from_checkpoint=str(out / "saved" / "checkpoint-2"))
    facts["resumed"] = found(resumed)
    facts["best"] = best(make(out / "best", fixed, RANKS, **BEST))
    facts["preempted"] = preempted(out / "preempted")
    undisturbed = make(out / "undisturbed", SparsityConfig(mask_interval=2), RANKS)
    undisturbed.train()
    facts["undisturbed"] = found(undisturbed)
    facts["no space"] = refused_for_space(out / "full")
    facts["gathers"] = {
        f"{dtype}, {masks}": gathers(dtype == "bf16", masks == "fixed")
        for dtype in ("bf16", "float32")
        for masks in ("fixed", "moving")
    }
    facts["bf16"] = kinds(half(out / "bf16", RANKS))
    facts["stages"] = stage_facts.facts()
    stage_facts.train(out / "stages", RANKS)
    facts["saved in pieces"] = stage_facts.saved(half(out / "half", RANKS), out / "stages")
    gathered: list[Any] = [None] * RANKS
    torch.distributed.all_gather_object(gathered, facts)
    if os.environ["RANK"] == "0":
        (out / "facts.json").write_text(json.dumps(gathered))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
