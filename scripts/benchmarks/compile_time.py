"""How much time do compiled kernels add to the start of a run on a machine that has never compiled them?

Ours: in a fresh process with an empty inductor cache, everything that a run with 2:4 masks compiles: the test of the
compiler, the mask of `nn.Linear` and of Conv1D, the update of one placement. Alternative: a minute, the limit.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from unittest.mock import patch

import torch

from ast_sparse.kernels.choice import compiler_fault
from ast_sparse.kernels.nm_masks import magnitude_mask
from ast_sparse.kernels.updates import PLACEMENTS, StepValues, update_weights
from scripts.benchmarks.harness import Result, Settings, main

LIMIT = 60.0
VALUES = StepValues(step=1, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, mask_decay=1e-4)


def seconds(placement: str, device: torch.device) -> float:
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        weight, grad, first, second = (torch.rand(64, 64, device=device) for _ in range(4))
        start = time.perf_counter()
        if (fault := compiler_fault(device.type)) is not None:
            raise RuntimeError(fault)
        mask = magnitude_mask(weight, 2, 4, 1, "compiled")
        magnitude_mask(weight, 2, 4, 0, "compiled")
        update_weights(placement, weight, grad, mask, first, second, VALUES, "compiled")
        return time.perf_counter() - start


def measure(settings: Settings) -> Iterator[Result]:
    if (fault := compiler_fault(settings.device.type)) is not None:
        yield Result(question="compile time", case="2:4", against="a minute", reason=fault, goal=1.0)
        return
    for placement in PLACEMENTS:
        times = [settings.in_child(seconds, placement, settings.device) for _ in range(settings.pairs(3))]
        about = dict(question="compile time", case=f"2:4, {placement}", against="a minute", goal=1.0)
        yield Result.of(times, [LIMIT] * len(times), **about)


if __name__ == "__main__":
    main(measure)
