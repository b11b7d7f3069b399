"""How many bytes and kernels does a micro-batch cost on a GPU, counted without one?

Ours beside dense layers, plain distillation with transformers, and the code before: a checkout after `--before`, or the
counts of `results/traffic_before.json` with their commit. `scripts/counts/` counts, on the CPU with toy widths, in a
process of its own; its files say what counts. Counts are exact, so each ratio has one value. They are not times.

Masked products: one layer, one token, bf16 autocast, float32 gradients; bytes a weight and micro-batch. Rows of FSDP2
are what a process does with its rows before they are sent, beside the cast of a dense layer: the mask itself is one
byte beside its six, so 1.17 is the least, and there is no goal.

Loss: from hidden states, without the products with the heads; bytes a logit (of one model).

Kernels: the second step of SparseTrainer with four micro-batches a step, LLaMAs with toy widths and the layers of the
model that is named, the loss in as many chunks as there. "Models alone" are student and teacher of transformers up to
their hidden states, forward and backward; "beyond models" is what is launched more than that. It can be negative,
because a kept masked weight also saves the cast of the weight that a dense layer makes. With `torch_compile` the
decoders of both models are graphs, whose kernels are those that the inductor plans for the true widths on an H100; the
rest is counted as above.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ast_sparse.errors import UserError
from scripts.benchmarks.harness import Result, Settings, main
from scripts.counts.child import QUICK, SHAPES

RECORDED = Path(__file__).with_name("results") / "traffic_before.json"
ROOT = Path(__file__).resolve().parents[2]
PRODUCTS_GOAL, KERNELS_GOAL = 1.08, 0.25
COMPILED = "compiled, inductor's count"
LOSS_GOALS = {"Triton": 12.0, COMPILED: 30.0}  # bytes a logit
Counts = dict[str, dict[str, float]]


def counted(quick: bool, code: Path | None = None) -> dict[str, Any]:
    """Commit and counts of this checkout, or of another one."""
    command = [sys.executable, "-m", "scripts.counts.child", *(["--quick"] if quick else [])]
    command += [] if code is None else ["--code", str(code.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise UserError(f"Counting failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(settings: Settings) -> Iterator[Result]:
    ours = counted(settings.quick)["counts"]
    recorded = (
        json.loads(RECORDED.read_text("utf-8")) if settings.before is None else counted(settings.quick, settings.before)
    )
    before, name = recorded["counts"], f"commit {recorded['commit']}"
    yield from products(ours, before, name)
    yield from loss(ours, before, name)
    for shape in QUICK if settings.quick else SHAPES:
        yield from kernels(ours, before, name, shape)


def products(ours: Counts, before: Counts, name: str) -> Iterator[Result]:
    """Rows about masked weights."""
    about: dict[str, Any] = dict(question="masked products, a weight", unit="B")
    for case in [each for each in ours if each.startswith("accumulation")]:
        masked = [ours[case]["masked"]]
        yield Result.of(masked, [ours[case]["dense"]], case=case, against="nn.Linear", goal=PRODUCTS_GOAL, **about)
        yield Result.of(masked, [before[case]["masked"]], case=case, against=name, **about)
        launched = [[counts[case]["kernels, masked"]] for counts in (ours, before)]
        yield Result.of(*launched, case=case, against=name, question="masked products", unit="kernels")
    case = "rows of FSDP2"
    masked = [ours[case]["masked"]]
    yield Result.of(masked, [ours[case]["dense"]], case=case, against="cast of dense rows", **about)
    yield Result.of(masked, [before[case]["masked"]], case=case, against=name, **about)


def loss(ours: Counts, before: Counts, name: str) -> Iterator[Result]:
    """Rows about the loss of hidden states."""
    ways = {"Triton": ours["loss"], COMPILED: ours["compiled loss"], "eager": ours["eager loss"]}
    if not ours["loss"]["launches of Triton"]:
        ways["Triton"] = {}
    for way, found in ways.items():
        about: dict[str, Any] = dict(question="loss, a logit", case=way, unit="B")
        if "bytes a logit" not in found:
            yield Result(against=name, reason="not in this code, or not in a quick run", **about)
            continue
        moved = [found["bytes a logit"]]
        if way in LOSS_GOALS:
            limit = LOSS_GOALS[way]
            yield Result.of(moved, [limit], against=f"limit of {limit:g} B", goal=1.0, **about)
        if way != COMPILED:  # the inductor counts otherwise
            yield Result.of(moved, [before["loss"]["bytes a logit"]], against=name, **about)
            yield Result.of(moved, [ours["plain loss"]["bytes a logit"]], against="plain HF distillation", **about)
    key = "bytes a weight of the head and chunk"
    about = dict(
        question="loss, a weight of the head and chunk", case="Triton" if ways["Triton"] else "eager", unit="B"
    )
    yield Result.of([ours["loss"][key]], [before["loss"][key]], against=name, **about)


def kernels(ours: Counts, before: Counts, name: str, shape: str) -> Iterator[Result]:
    """Rows about launches."""
    case = f"micro-batch, {shape}"
    here, there = ours[case], before[case]
    alone, plain = ours[f"models alone, {shape}"]["kernels"], ours[f"plain {case}"]["kernels"]
    about: dict[str, Any] = dict(question="kernels of a micro-batch", unit="kernels")
    total, were = [here["kernels"]], [there["kernels"]]
    notes = {"chunks of the loss": here["chunks"], "before": there["chunks"]}
    yield Result.of(total, were, case=shape, against=name, goal=KERNELS_GOAL, notes=notes, **about)
    yield Result.of([alone], were, case=f"{shape}: models alone", against=name, **about)
    yield Result.of(total, [plain], case=shape, against="plain HF distillation", **about)
    yield compiled_models(ours, total_before=there["kernels"], name=name, shape=shape)
    without = "kernels without products"
    yield Result.of([here[without]], [there[without]], case=f"{shape}: no products", against=name, **about)
    beyond = [[each["kernels"] - alone] for each in (here, there)]
    yield Result.of(*beyond, case=f"{shape}: beyond models", against=name, goal=KERNELS_GOAL, **about)
    losses = [[counts[f"loss, {shape}"]["kernels"]] for counts in (ours, before)]
    yield Result.of(*losses, case=f"{shape}: loss", against=name, goal=KERNELS_GOAL, **about)


def compiled_models(ours: Counts, total_before: float, name: str, shape: str) -> Result:
    """The row about launches with `torch_compile`; its notes have them by graph and kind."""
    found = ours.get(f"compiled micro-batch, {shape}")
    about: dict[str, Any] = dict(question="kernels of a micro-batch", unit="kernels", against=name)
    about["case"] = f"{shape}, torch_compile"
    if not found:
        return Result(reason="not in this code, or not in a quick run", **about)
    notes = {kind: count for kind, count in found.items() if kind != "kernels"}
    return Result.of([found["kernels"]], [total_before], goal=KERNELS_GOAL, notes=notes, **about)


if __name__ == "__main__":
    main(measure)
