"""Does a compressed export generate faster than the same model dense?

Ours: an export that stays compressed. Alternative: the same model as a dense export, with the same zeros. Both in bf16,
in processes of their own that take turns (`ast_sparse/speed/`), in transformers, and in vLLM if it is installed where
this runs (an environment with vLLM and `pip install -e .`). Models: random weights, exactly 2:4, in the shape of a
LLaMA with 1.17 billion parameters and in that of SmolLM2-135M; speed does not depend on the values. Measured: a step of
decode at batch 1 and 16, a prefill of 512 tokens, peak memory; on one and on two threads. The bound by bytes, and how
many tokens agree, are in the notes: `bound_by_bytes` is the least ratio (`bound` in older lines is its inverse).
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ast_sparse.export.export import export_model
from ast_sparse.sparsity.masks import nm_mask
from ast_sparse.sparsity.select import select_layers
from ast_sparse.speed.cases import Case
from ast_sparse.speed.comparison import Comparison, find_comparison
from ast_sparse.speed.outcomes import Outcome, bound
from ast_sparse.speed.side import InProcess, Process
from ast_sparse.speed.turns import measure as in_turns
from scripts.benchmarks.harness import Result, Settings, main

LENGTHS = {1: [(32, 17), (512, 2)], 16: [(32, 9)]}  # by batch: prompt, new tokens
REPEATS = 8  # a repeat times each prompt once, and the steps in one turn
NOT_WORSE = 1.0
MANY_TOKENS = 1 / 0.95


@dataclass(frozen=True)
class Shape:
    """A LLaMA with random weights, and its goals for a step at batch 1 by engine and for everything else."""

    name: str
    sizes: dict[str, Any]
    step: dict[str, float]
    others: float


LARGE = Shape(
    "LLaMA 1.17B",
    dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=16, max_position_embeddings=1024,
    ),
    step={"vllm": 1 / 1.5, "transformers": 1 / 2},
    others=MANY_TOKENS,
)  # fmt: skip
SMALL = Shape(
    "SmolLM2-135M",
    dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=1024, tie_word_embeddings=True,
    ),
    step={"vllm": NOT_WORSE, "transformers": NOT_WORSE},
    others=NOT_WORSE,
)  # fmt: skip
TINY = Shape(
    "tiny LLaMA",
    dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024,
    ),
    step={"vllm": NOT_WORSE, "transformers": NOT_WORSE},
    others=NOT_WORSE,
)  # fmt: skip


def measure(settings: Settings) -> Iterator[Result]:
    cores = os.cpu_count() or 1
    for shape in (TINY,) if settings.quick else (LARGE, SMALL):
        with tempfile.TemporaryDirectory() as folder:
            settings.in_child(write_exports, shape.sizes, folder)
            for engine in ("vllm", "transformers"):
                if engine == "vllm" and (settings.quick or find_spec("vllm") is None):
                    reason = "a quick call leaves it out" if settings.quick else "vLLM is not installed"
                    yield Result(question="vllm", case=shape.name, against="dense export", reason=reason)
                    continue
                for threads in [None] if settings.quick else [each for each in (1, 2) if each <= cores]:
                    yield from _compare(shape, Path(folder), engine, threads, settings)


def write_exports(sizes: dict[str, Any], folder: str) -> None:
    """Write a model with random weights that are exactly 2:4, dense and compressed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in select_layers(model)[0].values():
            layer.weight.mul_(nm_mask(layer.weight.abs()))
    for name in ("compressed", "dense"):
        export_model(model, Path(folder) / name, name, dtype="bfloat16")


def _compare(shape: Shape, folder: Path, engine: str, threads: int | None, settings: Settings) -> Iterator[Result]:
    # one set of processes for all cases: vLLM takes long to start
    cases = [Case(prompt, new, batch) for batch, lengths in LENGTHS.items() for prompt, new in lengths]
    found = find_comparison(
        folder / "compressed", folder / "dense", engine=engine, cases=cases, repeats=settings.pairs(REPEATS),
        threads=threads, device=str(settings.device),
    )  # fmt: skip
    outcomes = in_turns(found, progress=not settings.quick, start=InProcess if settings.quick else Process)
    for outcome in outcomes:
        yield from _results(shape, engine, threads, found, outcome)


def _results(shape: Shape, engine: str, threads: int | None, found: Comparison, outcome: Outcome) -> Iterator[Result]:
    case = outcome.case
    is_prefill = (case.prompt, case.new) == LENGTHS[1][-1]
    what = f"prefill of {case.prompt}" if is_prefill else f"decode, batch {case.batch}"
    about: dict[str, Any] = dict(
        question=f"{engine}: {what}", case=f"{shape.name}, {threads or 'all'} threads", against="dense export",
        goal=shape.step[engine] if not is_prefill and case.batch == 1 else shape.others,
    )  # fmt: skip
    if not outcome.is_measured:
        yield Result(reason=outcome.reason, **about)
        return
    same = f"{outcome.same[0]} of {outcome.same[1]}" if outcome.same else None
    gain = None if is_prefill else bound(found.weights)
    notes = {"bound_by_bytes": None if gain is None else 1 / gain, "same_tokens": same}  # ours by dense, as `ratio`
    ours, other = outcome.timings.values()
    seconds = (ours.prefill, other.prefill) if is_prefill else (ours.step, other.step)
    yield Result.of(*seconds, notes=notes, **about)
    if not is_prefill and case.batch == 1:
        memory = {**about, "question": f"{engine}: peak memory", "goal": NOT_WORSE, "unit": "MB"}
        yield Result.of([ours.peak / 1e6], [other.peak / 1e6], **memory)


if __name__ == "__main__":
    main(measure)
