"""Do Wanda and SparseGPT compute the masks and weights of the published code for the same layers and inputs?

    python scripts/checks/compare_oneshot.py --sparsegpt CHECKOUT --wanda CHECKOUT    # minutes on two cores

CHECKOUT: from github.com/IST-DASLab/sparsegpt and github.com/locuslab/wanda. Layers: random `nn.Linear` and `Conv1D` of
192 x 256 with correlated inputs, with and without dead input columns; eight sequences of 128 tokens. The published loop
over a layer's groups is inside Wanda's loading code, so its two lines are repeated here.
"""

import argparse
import contextlib
import copy
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ast_sparse.sparsity.oneshot import sparsegpt_prune, wanda_mask
from ast_sparse.sparsity.statistics import InputStatistics
from ast_sparse.tables import format_table

ROWS, COLUMNS, SEEDS = 192, 256, 6
PATTERNS = ((1, 2), (2, 4), (4, 8), (8, 16), None)
Layer = nn.Linear | Conv1D


def cases(seed: int) -> Iterator[tuple[str, Layer, list[Tensor]]]:
    """Kind, layer, inputs."""
    torch.manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS) / COLUMNS**0.5 + torch.eye(COLUMNS)
    inputs = [torch.randn(1, 128, COLUMNS) @ mixing for _ in range(8)]
    alive = torch.ones(COLUMNS)
    alive[[5, 77]] = 0
    yield "Linear", nn.Linear(COLUMNS, ROWS, bias=False), inputs
    yield "Conv1D", Conv1D(ROWS, COLUMNS), inputs
    yield "dead columns", nn.Linear(COLUMNS, ROWS, bias=False), [part * alive for part in inputs]


def out_by_in(layer: Layer) -> Tensor:
    """The weight as `[out, in]`."""
    return (layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()).detach()


def compare_sparsegpt(checkout: Path) -> list[tuple[object, ...]]:
    """Positions that differ, and the largest relative difference of the weights, by kind and pattern."""
    sys.path.insert(0, str(checkout))
    sys.modules["quant"] = types.ModuleType("quant")  # CUDA code of theirs that pruning does not touch
    torch.cuda.synchronize = lambda *args: None  # there is nothing to wait for on a CPU
    from sparsegpt import SparseGPT

    worst: dict[tuple[str, str], list[float]] = {}
    for seed in range(SEEDS):
        for kind, layer, inputs in cases(seed):
            for pattern in PATTERNS:
                theirs, ours = copy.deepcopy(layer), InputStatistics(COLUMNS, True, torch.device("cpu"))
                published = SparseGPT(theirs)
                for part in inputs:
                    published.add_batch(part, None)
                    ours.add(part)
                n, m = pattern or (1, 2)
                with contextlib.redirect_stdout(io.StringIO()):
                    published.fasterprune(0.5, prunen=m - n if pattern else 0, prunem=m if pattern else 0)
                assert ours.hessian is not None
                weight, _ = sparsegpt_prune(out_by_in(layer), ours.hessian, n, m, structured=pattern is not None)
                expected = out_by_in(theirs)
                found = worst.setdefault((kind, f"{n}:{m}" if pattern else "unstructured"), [0.0, 0.0])
                found[0] += int(((weight == 0) != (expected == 0)).sum())
                error = (weight - expected).norm() / expected.norm()
                found[1] = float(torch.maximum(error, torch.tensor(found[1])))  # NaN stays, as in no max of Python
    return [("SparseGPT", *key, int(wrong), f"{error:.1e}") for key, (wrong, error) in worst.items()]


def compare_wanda(checkout: Path) -> list[tuple[object, ...]]:
    """Positions that differ, by pattern."""
    sys.path.insert(0, str(checkout / "lib"))
    from layerwrapper import WrappedGPT

    wrong: dict[tuple[str, str], int] = {}
    for seed in range(SEEDS):
        for kind, layer, inputs in cases(seed):
            if not isinstance(layer, nn.Linear):  # theirs does not support Conv1D
                continue
            published, ours = WrappedGPT(layer), InputStatistics(COLUMNS, False, torch.device("cpu"))
            for part in inputs:
                published.add_batch(part, None)
                ours.add(part)
            metric = out_by_in(layer).abs() * torch.sqrt(published.scaler_row.reshape((1, -1)))
            for pattern in PATTERNS:
                n, m = pattern or (COLUMNS // 2, COLUMNS)
                groups = metric.unflatten(1, (-1, m))
                pruned = groups.topk(m - n, dim=-1, largest=False).indices
                expected = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, pruned, False).flatten(1)
                found = wanda_mask(
                    out_by_in(layer), ours.input_norm, *(pattern or (1, 2)), structured=pattern is not None
                )
                key = (kind, f"{n}:{m}" if pattern else "unstructured")
                wrong[key] = wrong.get(key, 0) + int((found != expected).sum())
    return [("Wanda", *key, count, "-") for key, count in wrong.items()]


def main() -> None:
    """See the docstring of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsegpt", type=Path, required=True, help="checkout of IST-DASLab/sparsegpt")
    parser.add_argument("--wanda", type=Path, required=True, help="checkout of locuslab/wanda")
    options = parser.parse_args()
    rows = compare_sparsegpt(options.sparsegpt) + compare_wanda(options.wanda)
    print(format_table(("method", "layer", "pattern", "positions that differ", "weights, relative"), rows))
    sys.exit(int(any(row[3] or (row[4] != "-" and not float(str(row[4])) <= 1e-4) for row in rows)))


if __name__ == "__main__":
    main()
