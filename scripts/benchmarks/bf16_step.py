"""Is a step in bf16 autocast, which `training.bf16: auto` chooses on some CPUs and GPUs, faster than one in float32?

Both sides are `SparseTrainer` as in `whole_step`, on the same batches; the alternative computes in float32. Each side
runs in its own process, in turns: the mean time of the steps after the first, and the peak of resident memory.
"""

from collections.abc import Iterator
from typing import Any

from ast_sparse.kernels.bf16 import multiplies_in_bf16
from scripts.benchmarks.harness import Result, Settings, main
from scripts.benchmarks.whole_step import run


def measure(settings: Settings) -> Iterator[Result]:
    shape = (2, 16) if settings.quick else (8, 256)
    about: dict[str, Any] = dict(question="step in bf16", against="the same in float32")
    has_it, reason = multiplies_in_bf16(settings.device)
    for name in ("tiny",) if settings.quick else ("gpt2", "smollm2"):
        case = f"{name}, {shape[0]} x {shape[1]}"
        if not (has_it or settings.quick):
            yield Result(case=case, reason=reason, **about)
            continue
        half, single = [], []
        for _ in range(settings.pairs(2)):
            half.append(settings.in_child(run, "bf16", name, shape, settings.device))
            single.append(settings.in_child(run, "ours", name, shape, settings.device))
        (times, peaks), (their_times, their_peaks) = zip(*half, strict=True), zip(*single, strict=True)
        yield Result.of(times, their_times, case=case, goal=1.0, **about)
        yield Result.of(peaks, their_peaks, case=f"{case}, memory", unit="MB", goal=1.0, **about)


if __name__ == "__main__":
    main(measure)
