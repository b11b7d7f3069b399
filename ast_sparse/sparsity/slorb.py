"""SLoRB, sparse low-rank boosting (paper Sec. 3.4): two small matrices that replace what was pruned."""

from typing import Literal

import torch
from torch import Tensor, nn

from ast_sparse.kernels.products import linear


def slorb_init(
    dense_weight: Tensor, start_weight: Tensor, k: int, init: Literal["mean", "zero"] = "mean"
) -> tuple[Tensor, Tensor]:
    """Start values of the adapter, (5) and (6).

    Args:
        dense_weight: `[out, in]`, the weight before pruning.
        start_weight: `[out, in]`, the masked weight training begins with.
        k: columns per group; divides `in`.
        init: `mean` as (6): the sum over the pruned weights of a group divided by k; `zero`: S = 0.

    Returns:
        S `[out, in/k]` and X `[in/k, in]` (`x_ij = 1` if column j is in group i), dtype of the weight.

    Raises:
        ValueError: k does not divide `in`, or `init` is unknown.
    """
    out_features, in_features = dense_weight.shape
    if k < 1 or in_features % k:
        raise ValueError(f"slorb.k={k} does not divide in_features={in_features}.")
    if init not in ("mean", "zero"):
        raise ValueError(f"slorb.init={init!r} is unknown. Use 'mean' or 'zero'.")
    groups = in_features // k
    x = torch.eye(groups, dtype=dense_weight.dtype, device=dense_weight.device).repeat_interleave(k, dim=1)
    if init == "zero":
        return dense_weight.new_zeros(out_features, groups), x
    pruned = dense_weight - start_weight
    return pruned.unflatten(1, (groups, k)).sum(-1) / k, x


class SLoRB(nn.Module):
    """`(input · Xᵀ) · Sᵀ`, added to the output of the sparse layer.

    Args:
        S: `[out, in/k]`, trained.
        X: `[in/k, in]`, the projection.
        train_projection: whether X is trained too, as in the paper's runs.
    """

    def __init__(self, S: Tensor, X: Tensor, train_projection: bool = True) -> None:
        super().__init__()
        self.S = nn.Parameter(S)
        self.X = nn.Parameter(X, requires_grad=train_projection)

    @property
    def k(self) -> int:
        """Columns per group."""
        return self.X.shape[1] // self.X.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        return linear(linear(input, self.X), self.S)
