"""Checks 8, 9 and 13: whole training steps beside plain distillation, the same compiled, and planned memory beside the
memory of a run."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from ast_sparse import DistillationConfig, SparseTrainer, SparsityConfig, sparsify_model
from ast_sparse.kernels.gpu import cusparselt
from ast_sparse.planning.memory import MemoryModel
from ast_sparse.planning.setup import Setup
from ast_sparse.training.checks.arguments import build_arguments
from scripts.checks.gpu_checks.bench import Bench, Clock, Line, compared, cost, info, launched, right, waits, worst
from scripts.checks.gpu_checks.shapes import matrix_flops, new_model, token_ids

ALPHA = 0.67
WARMUPS, STEPS, PROFILED = 10, 20, 3  # the first refresh, which compiles, is in the warm-ups
OPTIONS: dict[str, Any] = dict(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1)
GIB = 2**30
_TIME_GOAL, _MEMORY_GOAL = 0.8, 0.5
Shape = tuple[str, int, int]  # name, sequences, tokens of each


def _shapes(bench: Bench) -> tuple[Shape, ...]:
    return bench.pick((("SmolLM2-135M", 8, 2048), ("LLaMA-1.1B", 4, 2048)), (("tiny", 2, 16),))


# ---- 8: whole step -------------------------------------------------------------------------------------------------


def whole_step(bench: Bench) -> Iterator[Line]:
    """SparseTrainer in bf16 beside a plain loop with the same teacher; each side in a process of its own."""
    for shape in _shapes(bench):
        case = "{}, {} x {}".format(*shape)
        steps = bench.pick((WARMUPS, STEPS, PROFILED), (1, 2, 1))
        found = {name: bench.in_child(side, bench.is_dry, shape, *steps) for name, side in SIDES.items()}
        times = {name: each["milliseconds"] for name, each in found.items()}
        peaks = {name: each["allocated"] for name, each in found.items()}
        yield cost(bench, f"{case}, time", times["ours"] / times["plain"], _TIME_GOAL, milliseconds=times)
        ratio = None if bench.is_dry else peaks["ours"] / peaks["plain"]
        yield cost(bench, f"{case}, memory", ratio, _MEMORY_GOAL, bytes=peaks)
        losses = {name: each["loss"] for name, each in found.items()}
        yield info(f"{case}, losses: ours is the mean of all steps, plain the last", **losses)
        # forward and backward pass of the student and forward pass of the teacher
        flops = 4 * matrix_flops(shape[0]) * shape[1] * shape[2]
        rates = {name: flops / each * 1e3 for name, each in times.items()}
        shares = {name: each / bench.rates["product"] for name, each in rates.items() if "product" in bench.rates}
        yield info(f"{case}, rate", flop_a_second=rates, share_of_product_rate=shares)
        for name, each in found.items():
            yield info(f"{case}, {name}, where a step spends its time", **each["profile"])
        yield from _semi_structured_steps(bench, case, shape, steps, found["ours"])
    yield from _semi_structured_products(bench)


def ours(
    is_dry: bool, shape: Shape, warmups: int, steps: int, profiled: int, compiles: bool = False, forward: Any = "off"
) -> dict[str, Any]:
    """The mean time of a step with SparseTrainer, its peak, and what it spends its time on.

    Args:
        forward: `sparsity.semi_structured`.
    """
    watch = Watch(is_dry, warmups, steps, profiled)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(is_dry, shape, warmups + steps + profiled + 1, folder, compiles, forward)
        trainer.add_callback(watch)
        loss = trainer.train().training_loss
    backends: Any = torch.backends
    found = {"loss": loss, "breaks": dict(counters["graph_break"]), "fp32_precision": backends.fp32_precision}
    return {**watch.found(), **_memory(is_dry), **found}


def _trainer(is_dry: bool, shape: Shape, steps: int, folder: str, compiles: bool, forward: Any) -> SparseTrainer:
    name, rows, length = shape
    sparsity = dict(mask_interval=2 if is_dry else 10, kernels="eager" if is_dry else "auto", semi_structured=forward)
    backend = ("eager" if is_dry else "inductor") if compiles else None
    settings: dict[str, Any] = dict(
        max_steps=steps, per_device_train_batch_size=rows, bf16=True, use_cpu=is_dry, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, learning_rate=OPTIONS["lr"],
        adam_beta2=OPTIONS["betas"][1], weight_decay=OPTIONS["weight_decay"], torch_compile_backend=backend,
    )  # fmt: skip
    return SparseTrainer(
        new_model(name, torch.device("cpu" if is_dry else "cuda:0")), build_arguments(settings, folder),
        sparsity_config=SparsityConfig(**sparsity),
        distillation_config=DistillationConfig(alpha=ALPHA),
        train_dataset=[{"input_ids": ids} for ids in token_ids(name, rows * steps, length).tolist()],
    )  # fmt: skip


class Watch(TrainerCallback):
    """Times the steps of a loop or of a Trainer after some warm-ups, profiles some more, and counts waits in one."""

    def __init__(self, is_dry: bool, warmups: int, steps: int, profiled: int) -> None:
        self.clock, self.is_dry = Clock(is_dry), is_dry
        self.first, self.steps, self.profiled = warmups, steps, profiled
        self.done, self.waits = 0, list[str]()
        self._stack = ExitStack()
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [] if is_dry else [torch.profiler.ProfilerActivity.CUDA]
        self.profiler = torch.profiler.profile(activities=activities)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called after each step."""
        self.done += 1
        last = self.first + self.steps
        if self.first <= self.done <= last:
            self.clock.mark()
        if self.done == last:
            self.profiler.start()
        if self.done == last + self.profiled:
            if not self.is_dry:
                torch.cuda.synchronize()
            self.profiler.stop()
            if not self.is_dry:
                self.waits = self._stack.enter_context(waits())
        if self.done == last + self.profiled + 1:
            self._stack.close()

    def found(self) -> dict[str, Any]:
        """The mean milliseconds of a step, refreshes included, and the 15 kernels that take most time."""
        times = self.clock.milliseconds()
        events: Any = self.profiler.key_averages()
        spent = "self_cpu_time_total" if self.is_dry else "self_device_time_total"
        rows = [
            (getattr(each, spent) / 1e3 / self.profiled, each.count / self.profiled, each.key)
            for each in (events if self.is_dry else launched(events))
        ]
        rows.sort(reverse=True)
        profile = {"milliseconds": sum(row[0] for row in rows), "kernels": sum(row[1] for row in rows)}
        top = [f"{spent:.3f} ms, {count:g} x {name[:90]}" for spent, count, name in rows[:15]]
        profiled = {"a_step": profile, "top": top, "waits": dict(Counter(self.waits))}
        return {"milliseconds": sum(times) / len(times), "profile": profiled}


def plain(is_dry: bool, shape: Shape, warmups: int, steps: int, profiled: int) -> dict[str, Any]:
    """The same of a plain loop: bf16 autocast, a bf16 teacher, `F.kl_div` on full logits, clipping, fused AdamW."""
    name, rows, length = shape
    device = torch.device("cpu" if is_dry else "cuda:0")
    student = new_model(name, device).train()
    teacher = new_model(name, device).to(torch.bfloat16).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True, **OPTIONS)
    watch, count = Watch(is_dry, warmups, steps, profiled), warmups + steps + profiled + 1
    loss = torch.zeros(())
    for batch in token_ids(name, rows * count, length).split(rows):
        loss = _plain_loss(student, teacher, batch.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.on_step_end()
    return {**watch.found(), **_memory(is_dry), "loss": float(loss.detach())}


def _plain_loss(student: Any, teacher: Any, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        outputs = student(input_ids=ids, labels=ids, use_cache=False)
        with torch.no_grad():
            reference = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        log_s, log_t = outputs.logits[:, :-1].float().log_softmax(-1), reference.float().log_softmax(-1)
        kl = F.kl_div(log_s.flatten(0, 1), log_t.flatten(0, 1), reduction="batchmean", log_target=True)
        loss: Tensor = (1 - ALPHA) * outputs.loss + ALPHA * kl
    return loss


SIDES = {"ours": ours, "plain": plain}


def _memory(is_dry: bool) -> dict[str, int | None]:
    """Peaks of what torch has allocated and reserved, and what the device holds beside that."""
    if is_dry:
        return dict.fromkeys(("allocated", "reserved", "outside"))
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    return {
        "allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(),
        "outside": outside,
    }  # fmt: skip


def _semi_structured_steps(
    bench: Bench, case: str, shape: Shape, steps: tuple[int, int, int], dense: dict[str, Any]
) -> Iterator[Line]:
    """Steps with `sparsity.semi_structured` beside those with dense forward products."""
    case = f"{case}, semi-structured forward"
    # in a child: the others are forked from this process, which must not have used its GPU
    if bench.is_dry or (reason := bench.in_child(cusparselt.fault, bench.device)) is not None:
        yield info(case, absent="dry" if bench.is_dry else reason)
        return
    found = bench.in_child(ours, bench.is_dry, shape, *steps, False, "on")
    sides = {"semi-structured": found, "dense": dense}
    apart = abs(found["loss"] - dense["loss"]) / dense["loss"]
    losses = {name: each["loss"] for name, each in sides.items()}
    yield right(f"{case}, mean loss", apart <= 1e-2, "equal within 1e-2", **losses)
    times = {name: each["milliseconds"] for name, each in sides.items()}
    peaks = {name: each["allocated"] for name, each in sides.items()}
    yield info(f"{case}, time", ratio=times["semi-structured"] / times["dense"], milliseconds=times, bytes=peaks)
    yield info(f"{case}, where a step spends its time", **found["profile"])


def _semi_structured_products(bench: Bench) -> Iterator[Line]:
    """The 2:4 products of these forward passes beside dense ones: values, time, and what compressing takes."""
    shapes = ((1536, 576, 16384), (2048, 2048, 8192), (5632, 2048, 8192), (2048, 5632, 8192))
    for rows, columns, tokens in bench.pick(shapes, ((32, 64, 8),)):
        case = f"semi-structured {rows}x{columns}, {tokens} tokens"
        if bench.is_dry or not cusparselt.takes(rows, columns, torch.bfloat16, bench.device):
            yield info(case, absent="dry" if bench.is_dry else "no such product here")
            continue
        dense = bench.random(rows, columns, dtype=torch.bfloat16)
        dense *= torch.tensor([1, 0, 1, 0], device=bench.device).repeat(columns // 4)
        x = bench.random(tokens, columns, dtype=torch.bfloat16)
        compressed = cusparselt.compress(dense)
        error = worst(cusparselt.linear(x, compressed, None), F.linear(x, dense))
        yield right(f"{case}, values", error <= 2**-7, "error <= 2^-7 of the dense product", error=error)
        sides: dict[str, Callable[[], Any]] = {
            "dense": partial(F.linear, x, dense), "semi-structured": partial(cusparselt.linear, x, compressed, None),
            "compression": partial(cusparselt.compress, dense),
        }  # fmt: skip
        times = bench.times(sides)
        yield info(case, ratio=times["semi-structured"] / max(times["dense"], 1e-9), milliseconds=times)


# ---- 13: compiled steps ----------------------------------------------------------------------------------------------


def compiled_step(bench: Bench) -> Iterator[Line]:
    """The steps of SparseTrainer with `torch_compile` beside those without; each side in a process of its own.

    A model of few layers, because its compilation may take minutes; breaks and ratios say the same.
    """
    shape = bench.pick(("LLaMA, 4 layers", 8, 2048), _shapes(bench)[0])
    case, steps = "{}, {} x {}".format(*shape), bench.pick((WARMUPS, STEPS, PROFILED), (1, 2, 1))
    found = {
        name: bench.in_child(ours, bench.is_dry, shape, *steps, compiles)
        for name, compiles in {"eager": False, "ours": True}.items()
    }
    times = {name: each["milliseconds"] for name, each in found.items()}
    losses = {name: each["loss"] for name, each in found.items()}
    apart = abs(losses["ours"] - losses["eager"]) / losses["eager"]
    yield right(f"{case}, mean loss", apart <= 1e-2, "equal within 1e-2", **losses)
    yield right(f"{case}, breaks of graphs", not found["ours"]["breaks"], "none", breaks=found["ours"]["breaks"])
    precision = found["ours"]["fp32_precision"]
    yield right(f"{case}, float32 products", precision != "tf32", "not in TF32", fp32_precision=precision)
    yield compared(bench, f"{case}, time", times, "eager", 1.0)
    peaks = {name: each["allocated"] for name, each in found.items()}
    yield cost(bench, f"{case}, memory", None if bench.is_dry else peaks["ours"] / peaks["eager"], 1.0, bytes=peaks)
    yield info(f"{case}, where a compiled step spends its time", **found["ours"]["profile"])


# ---- 9: memory -----------------------------------------------------------------------------------------------------


def memory(bench: Bench) -> Iterator[Line]:
    """The plan of `--dry-run` beside what a run of a few steps takes."""
    for shape in _shapes(bench):
        case = "{}, {} x {}".format(*shape)
        planned = bench.in_child(_planned, bench.is_dry, shape)
        found = bench.in_child(ours, bench.is_dry, shape, 1, bench.pick(10, 2), 1)
        if bench.is_dry:
            yield cost(bench, f"{case}, planned over allocated", None, 1.1, planned=planned)
            continue
        ratio, allocated = planned["total"] / found["allocated"], found["allocated"]
        yield right(f"{case}, planned over allocated", 0.9 <= ratio <= 1.1, "0.9 to 1.1", ratio=ratio,
                    allocated=allocated, planned=planned)  # fmt: skip
        yield cost(bench, f"{case}, reserved over allocated", found["reserved"] / allocated, 1.15)
        yield cost(bench, f"{case}, GiB outside torch", found["outside"] / GIB, 2.0)


def _planned(is_dry: bool, shape: Shape) -> dict[str, Any]:
    """The plan's bytes, by item; no device is needed."""
    name, rows, length = shape
    student, teacher = (new_model(name, torch.device("meta")) for _ in range(2))
    sparsify_model(student, SparsityConfig())
    setup = Setup(
        batch_size=rows, eval_batch_size=0, gradient_accumulation_steps=1, block_size=length, dtype=torch.bfloat16,
        gradient_checkpointing=False, on_cpu=is_dry, masked_weights="kept", fast_forward=is_dry,
    )  # fmt: skip
    plan = MemoryModel(student, teacher, DistillationConfig(alpha=ALPHA))(setup)
    return {"total": plan.total, "moment": plan.moment, "items": plan.items}
