"""Checks 1, 10 and 12: runs of SparseTrainer that are sharded, resumed, ended by a signal, and on two processes."""

import hashlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainingArguments

from ast_sparse import DistillationConfig, SparseTrainer, SparsityConfig, sparse_layers
from scripts.checks.gpu_checks.bench import Bench, Child, ChildError, Line, right
from scripts.checks.gpu_checks.shapes import new_model, token_ids

_CONFIG = """
model: {{name_or_path: {folder}/model}}
data: {{train: {folder}/text.txt, eval_share: 0.1, block_size: 16}}
sparsity: {{mask_interval: 5}}
training:
  {{max_steps: {steps}, logging_steps: 1, full_determinism: true, use_cpu: {is_dry}, report_to: none,
    disable_tqdm: true}}
evaluation: {{datasets: [heldout], windows: 4, report: false}}
"""


def _steps(bench: Bench) -> tuple[int, int, int]:
    """Steps of a run, the step of its checkpoint, and micro-batches in a step."""
    return bench.pick((6, 3, 4), (4, 2, 2))


def _trainer(bench: Bench, folder: Path, **args: Any) -> SparseTrainer:
    """A run of a few steps on random ids, whose masks move."""
    name, (rows, length) = bench.pick(("LLaMA, 4 layers", (2, 512)), ("tiny", (1, 16)))
    steps, _, accumulation = _steps(bench)
    count = rows * steps * accumulation * 2
    settings: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=rows, bf16=True, learning_rate=3e-4,
        gradient_accumulation_steps=accumulation, use_cpu=bench.is_dry, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return SparseTrainer(
        new_model(name), TrainingArguments(**{**settings, **args}),
        sparsity_config=SparsityConfig(mask_interval=2, mask_decay=1e-2),
        distillation_config=DistillationConfig(),
        train_dataset=[{"input_ids": ids} for ids in token_ids(name, count, length).tolist()],
    )  # fmt: skip


def _losses(run: SparseTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def _alone() -> dict[str, str]:
    return _rank(0, 1, _free_port())


def _rank(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun would set; all processes use the first device."""
    values = dict(RANK=rank, WORLD_SIZE=processes, LOCAL_RANK=0, LOCAL_WORLD_SIZE=processes, MASTER_PORT=port)
    return {**{name: str(value) for name, value in values.items()}, "MASTER_ADDR": "127.0.0.1"}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _hashes(run: SparseTrainer) -> dict[str, str]:
    """Of weights, masks and moments of a run that is not sharded."""
    layers = sparse_layers(run.student)
    masks = ((name, layer.mask) for name, layer in layers.items())
    weights = ((name, each) for name, each in run.student.named_parameters() if each.is_floating_point())
    optimizer: Any = getattr(run.optimizer, "optimizer", run.optimizer)
    moments = (
        (f"{name}.{key}", optimizer.state[each][key])
        for name, each in run.student.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
        if each in optimizer.state
    )
    return {"weights": _digest(weights), "masks": _digest(masks), "moments": _digest(moments)}


# ---- 1: FSDP2 ------------------------------------------------------------------------------------------------------


def fsdp2(bench: Bench) -> Iterator[Line]:
    """A sharded run on one process (NCCL on a GPU) beside a plain one; it is saved and resumed."""
    steps, saved, accumulation = _steps(bench)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = bench.in_child(_plain, bench, folder / "plain")
        child = bench.start(_sharded, bench, folder / "sharded", None, environment=_alone())
        found = child.result(bench.left(120))
        losses = found.pop("losses")
        errors = [abs(a / b - 1) for a, b in zip(losses, plain, strict=True)]
        case = f"bf16, accumulation {accumulation}, checkpointing, {found['backend']}"
        yield right(f"{case}: losses", max(errors) <= 1e-2, "<= 1e-2 of the plain run's", errors=errors, losses=losses)
        dtypes = found["gathered"]
        is_right = bool(dtypes) and not set(dtypes) & {"torch.bool", "torch.uint8"}
        yield right(f"{case}: what is gathered", is_right, "no mask", dtypes=dtypes)
        whole = found["whole_gradients"]
        yield right(f"{case}: whole gradients after a micro-batch", whole == 0, "0 bytes", bytes=whole)
        checkpoint = str(folder / "sharded" / f"checkpoint-{saved}")
        child = bench.start(_sharded, bench, folder / "resumed", checkpoint, environment=_alone())
        again = child.result(bench.left(120))["losses"]
        errors = [abs(a / b - 1) for a, b in zip(again[saved - steps :], losses[saved:], strict=True)]
        expected = "<= 1e-3 of the run without a stop"
        yield right(f"{case}: losses after a resume", max(errors) <= 1e-3, expected, errors=errors)


def _plain(bench: Bench, folder: Path) -> list[float]:
    run = _trainer(bench, folder, gradient_checkpointing=True)
    run.train()
    return _losses(run)


def _sharded(bench: Bench, folder: Path, checkpoint: str | None) -> dict[str, Any]:
    saves = {} if checkpoint else {"save_strategy": "steps", "save_steps": _steps(bench)[1]}
    run = _trainer(bench, folder, fsdp=True, fsdp_config={"activation_checkpointing": True}, **saves)
    watch = Pieces()
    run.add_callback(watch)
    run.train(resume_from_checkpoint=checkpoint)
    backend = torch.distributed.get_backend()
    return {"losses": _losses(run), "backend": backend, "whole_gradients": watch.most, "gathered": sorted(watch.dtypes)}


class Pieces(TrainerCallback):
    """What FSDP2 gathers, and the bytes of whole gradients that it keeps between micro-batches, at most."""

    def __init__(self) -> None:
        self.most, self.dtypes = 0, set[str]()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after each micro-batch but the last of a step."""
        modules = [module for module in kwargs["model"].modules() if isinstance(module, FSDPModule)]
        parameters = [each for module in modules for each in _parameters(module)]
        kept = [each.unsharded_accumulated_grad for each in parameters]  # in another dtype than the parameter
        kept += [getattr(getattr(each, "_unsharded_param", None), "grad", None) for each in parameters]
        self.most = max(self.most, sum(grad.nbytes for grad in kept if grad is not None))
        if not self.dtypes:
            self.dtypes = {str(tensor.dtype) for each in parameters for tensor in each.all_gather_inputs}


def _parameters(module: FSDPModule) -> list[Any]:
    """What FSDP2 shards in a module; torch 2.11 has one group of them, later versions a list."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return [each for group in groups for each in group.fsdp_params]


# ---- 10: resume ----------------------------------------------------------------------------------------------------


def resume(bench: Bench) -> Iterator[Line]:
    """A resumed run has the bits of one without a stop under `full_determinism`; SIGUSR1 ends `ast-train` with 75.

    It measures the dense model on the device before its trainer is made: full determinism must be prepared by then.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = bench.in_child(_determined, bench, folder / "whole", None)
        checkpoint = str(folder / "whole" / f"checkpoint-{_steps(bench)[1]}")
        again = bench.in_child(_determined, bench, folder / "again", checkpoint)
        differ = [key for key in whole if whole[key] != again[key]]
        yield right("resumed under full_determinism", not differ, "equal to the bit", differ=differ, hashes=whole)
        yield from _signal(bench, folder)


def _determined(bench: Bench, folder: Path, checkpoint: str | None) -> dict[str, str]:
    saves = {} if checkpoint else {"save_strategy": "steps", "save_steps": _steps(bench)[1]}
    run = _trainer(bench, folder, full_determinism=True, **saves)
    run.train(resume_from_checkpoint=checkpoint)
    return _hashes(run)


def _signal(bench: Bench, folder: Path) -> Iterator[Line]:
    bench.in_child(_write_inputs, bench, folder)  # a process that has computed cannot be forked
    command = ["ast-train", "--config", str(folder / "run.yaml"), "--output-dir", str(folder / "out")]
    run = bench.start(_command, command)
    try:
        _wait_for(folder / "out" / "metrics.jsonl", run, bench.left(90))
        assert run.process.pid is not None
        os.kill(run.process.pid, signal.SIGUSR1)
        code = run.exit_code(bench.left(60))
    finally:
        run.end()
    saved = sorted(path.name for path in (folder / "out").glob("checkpoint-*"))
    yield right("SIGUSR1 in a step of ast-train", code == 75 and len(saved) == 1, "exit 75", exit=code, saved=saved)
    code = bench.start(_command, [*command, "--resume"]).exit_code(bench.left(90))
    is_done = (folder / "out" / "model.safetensors").exists()
    yield right("ast-train --resume after it", code == 0 and is_done, "exit 0, and a model", exit=code, model=is_done)


def _write_inputs(bench: Bench, folder: Path) -> None:
    from tests.models import generated_text, save_tiny_model

    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text(generated_text(400))
    steps, is_dry = bench.pick(200, 40), str(bench.is_dry).lower()
    (folder / "run.yaml").write_text(_CONFIG.format(folder=folder, steps=steps, is_dry=is_dry))


def _command(arguments: list[str]) -> None:
    from ast_sparse.cli.train import main

    sys.argv = arguments
    main()


def _wait_for(path: Path, run: Child, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until or not run.process.is_alive():
            raise ChildError(f"ast-train has not trained a step after {seconds:.0f} s, exit {run.process.exitcode}")
        time.sleep(0.02)


# ---- 12: DDP -------------------------------------------------------------------------------------------------------


def ddp(bench: Bench) -> Iterator[Line]:
    """Two processes on one device, over gloo, end with the same weights and masks."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as name:
        given = (Path(name), bench)
        ranks = [bench.start(_replica, *given, environment=_rank(rank, 2, port)) for rank in range(2)]
        try:
            first, second = [rank.result(bench.left(100)) for rank in ranks]
        finally:
            for rank in ranks:
                rank.end()
    differ = [key for key in first if first[key] != second[key]]
    yield right("two processes on one device, gloo", not differ, "equal to the bit", differ=differ, found=first)


def _replica(folder: Path, bench: Bench) -> dict[str, Any]:
    run = _trainer(bench, folder, ddp_backend="gloo", gradient_accumulation_steps=2)
    run.train()
    return {**_hashes(run), "processes": torch.distributed.get_world_size(), "flips": _flips(run)}


def _flips(run: SparseTrainer) -> list[float]:
    return [entry["flip_rate"] for entry in run.state.log_history if "flip_rate" in entry]
