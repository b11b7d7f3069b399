"""SLoRB, sparse low-rank boosting (paper Sec. 3.4): two small matrices that replace what was pruned."""

from typing import Literal

import torch
from torch import Tensor, nn

from ast_sparse.config import SLoRBConfig
from ast_sparse.config.sparsity import Method
from ast_sparse.errors import UserError
from ast_sparse.kernels.products import linear
from ast_sparse.sparsity.oneshot import METHODS


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


def slorb_svd(dense_weight: Tensor, start_weight: Tensor, k: int, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
    """Start values of the adapter that bring the layer's outputs on calibration text closest to those of the dense one.

    With D the difference of the two weights and H the sum of the inputs' outer products, S X is the matrix of rank in/k
    with the smallest `tr((D - S X) H (D - S X)ᵀ)`: U Uᵀ D, with U the first eigenvectors of `D H Dᵀ`. S and X get the
    same norm. X is not the one of (5).

    Args:
        dense_weight, start_weight, k: as in `slorb_init`.
        hessian: `[in, in]`, up to a factor; None: all inputs count alike.

    Returns:
        S `[out, in/k]` and X `[in/k, in]`, dtype of the weight, computed in float32 or wider.
    """
    out_features, in_features = dense_weight.shape
    wide = torch.promote_types(dense_weight.dtype, torch.float32)
    lost, rank = dense_weight.to(wide) - start_weight.to(wide), in_features // k
    hessian = torch.eye(in_features, dtype=wide, device=lost.device) if hessian is None else hessian.to(lost)
    if out_features <= in_features:
        left = _first_eigenvectors(lost @ hessian @ lost.t(), rank)
    else:  # the same vectors from the smaller matrix
        values, vectors = torch.linalg.eigh(hessian)
        seen = lost @ (vectors * values.clamp(min=0).sqrt())
        left = torch.linalg.qr(seen @ _first_eigenvectors(seen.t() @ seen, rank)).Q
    s, x = lost.new_zeros(out_features, rank), lost.new_zeros(rank, in_features)
    s[:, : left.shape[1]], x[: left.shape[1]] = left, left.t() @ lost
    balance = (x.norm() / s.norm()).sqrt()
    if balance > 0:
        s, x = s * balance, x / balance
    return s.to(dense_weight.dtype), x.to(dense_weight.dtype)


def init_without_text(slorb: SLoRBConfig) -> Literal["mean", "zero"]:
    """How S begins where no text is read; zero if it is set later: by `restart_slorb`, or from the files of a start."""
    return "mean" if slorb.init == "mean" and slorb.start == 0 else "zero"


def check_slorb(init: Method, slorb: SLoRBConfig | None) -> None:
    """Raise UserError if SLoRB is to be made from calibration text, and pruning reads none."""
    if slorb is not None and slorb.enabled and slorb.init == "svd" and not METHODS[init].needs_text:
        raise UserError(
            f"slorb.init=svd needs text, and sparsity.init={init!r} reads none. Choose sparsegpt or wanda, or set "
            "slorb.init to mean.",
            "slorb.init",
            "sparsity.init",
        )


def _first_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """Eigenvectors of a symmetric matrix as columns, those of the largest eigenvalues first; all if there are fewer."""
    return torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :count]


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
