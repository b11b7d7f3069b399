"""Is a whole training step of GPT-2 124M faster than with the public AST code, on the same batch?

`--reference CHECKOUT` names a checkout of the public code, which is imported from there: its models of that shape
with random weights, magnitude masks, 0.33 task + 0.67 KL loss, clipping and its own AdamW, in the steps of its main.py,
in float32 like ours (`whole_step`). It keeps the hidden states too and computes their loss, because it does not run
without; the gradient of that loss is left out. It has no dropout, so ours has none here. It refreshes masks every 10
steps: a tenth of a refresh, measured separately, is added to its step, and the notes have both; ours refreshes once in
2 steps here. Each side runs in its own process, in turns; memory as in `whole_step`.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import GPT2Config

from ast_sparse.errors import UserError
from scripts.benchmarks.harness import PeakMemory, Result, Settings, main
from scripts.benchmarks.whole_step import ALPHA, DECAY, OPTIONS, run

TIME_GOALS = {"cpu": 1.0, "cuda": 0.5}  # on a CPU both sides spend most of their time on the same products
MEMORY_GOAL = 0.50
STEPS, INTERVAL = 2, 10  # measured, after one that is not; steps between refreshes
FILES = ("adamw", "sparse_modeling", "model", "utils")
FIX = "Give a checkout of the public AST code."
UNUSED = ("wandb", "tiktoken", "datasets")  # imported there, but not used in a step


@contextlib.contextmanager
def public_code(checkout: Path) -> Iterator[dict[str, ModuleType]]:
    """The modules that a step needs, by name; what they print is dropped.

    Raises:
        UserError: they cannot be imported.
    """
    absent = [name for name in UNUSED if name not in sys.modules and not importlib.util.find_spec(name)]
    sys.modules.update({name: _Absent(name) for name in absent})
    sys.path.insert(0, str(checkout))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                modules = {file: importlib.import_module(file) for file in FILES}
            except Exception as error:  # the code of a folder can raise anything
                raise UserError(f"--reference {checkout} cannot be imported: {error}. {FIX}") from error
            yield modules
    finally:
        sys.path.remove(str(checkout))
        for name in (*FILES, *absent):
            sys.modules.pop(name, None)


class _Absent(ModuleType):
    """A package that is not installed, and that a step does not call."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def public_step(checkout: Path, shape: tuple[int, int], device: torch.device) -> tuple[float, float, float]:
    """Seconds of a step without refresh, those of a refresh, and the peak in MB."""
    config = GPT2Config()
    with public_code(checkout) as code, PeakMemory() as memory:
        torch.manual_seed(0)
        gpt = code["model"]
        sizes = dict(block_size=config.n_positions, vocab_size=config.vocab_size)
        teacher = gpt.GPT(gpt.GPTConfig(**sizes, is_teacher=True))
        masked = code["sparse_modeling"].SparseLinearConfig(SLoRB=False)
        student = gpt.GPT(gpt.GPTConfig(**sizes, is_teacher=False), masked)
        code["utils"].initialize_model(student)
        model = code["sparse_modeling"].Distill_Model(student.train(), teacher, output_hidden_state=True)
        optimizer = student.configure_optimizers(OPTIONS["weight_decay"], OPTIONS["lr"], OPTIONS["betas"], device.type)
        code["utils"].sync_weight(model, device)
        ids = torch.randint(0, config.vocab_size, (STEPS + 1, shape[0], shape[1] + 1), device=device)
        refresh = _seconds(code["utils"].calculate_model_mask, model)
        times = [_seconds(_train, model, optimizer, batch) for batch in ids]
    return sum(times[1:]) / STEPS, refresh, memory.above / 1e6


def _train(model: Any, optimizer: Any, batch: torch.Tensor) -> None:
    _, task, _, kl = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
    ((1 - ALPHA) * task + ALPHA * kl).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(decay=DECAY)
    optimizer.zero_grad(set_to_none=True)


def _seconds(call: Any, *args: Any) -> float:
    start = time.perf_counter()
    call(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(settings: Settings) -> Iterator[Result]:
    shape = (2, 16) if settings.quick else (8, 256)
    about: dict[str, Any] = dict(question="whole step", against="public AST code")
    name = "gpt2, no dropout"
    case = f"{name}, {shape[0]} x {shape[1]}"
    if settings.reference is None:
        yield Result(case=case, reason="give --reference CHECKOUT", **about)
        return
    for file in FILES:
        if not (settings.reference / f"{file}.py").is_file():
            raise UserError(f"--reference {settings.reference} has no file {file}.py. {FIX}")
    ours, theirs, refreshes = [], [], []
    for _ in range(settings.pairs(2)):
        ours.append(settings.in_child(run, "ours", name, shape, settings.device))
        seconds, refresh, peak = settings.in_child(public_step, settings.reference, shape, settings.device)
        theirs.append((seconds + refresh / INTERVAL, peak))
        refreshes.append(refresh)
    (times, peaks), (their_times, their_peaks) = zip(*ours, strict=True), zip(*theirs, strict=True)
    notes = {"seconds of a refresh of theirs": [round(each, 2) for each in refreshes]}
    yield Result.of(times, their_times, case=case, goal=TIME_GOALS[settings.device.type], notes=notes, **about)
    yield Result.of(peaks, their_peaks, case=f"{case}, memory", unit="MB", goal=MEMORY_GOAL, **about)


if __name__ == "__main__":
    main(measure)
