"""Which layers of an export are written as pruned, and why the others stay dense."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ast_sparse.errors import UserError
from ast_sparse.export.awq.rounding import Rounded
from ast_sparse.export.codec import Codec
from ast_sparse.export.formats import codecs
from ast_sparse.export.source import Source
from ast_sparse.sparsity.layers import out_by_in
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.select import select_layers
from ast_sparse.storage.dtypes import loaded_dtypes


@dataclass(frozen=True)
class LayerPlan:
    """Which layers are exported as pruned (with their `group_dim`), and why the others are left dense.

    `codec` is that of the format, None if zeros are written out. `dtypes` has the dtype of every floating-point tensor
    that is written. `rounded` is what the codec's rounding did, None if it holds every weight.
    """

    format: str
    codec: Codec | None
    pruned: dict[str, int]
    dense: dict[str, str]
    dtypes: dict[str, torch.dtype]
    rounded: Rounded | None = None

    def stored_bytes(self, source: Source) -> int:
        """Bytes of all weights as they are written, without SLoRB."""
        total = 0
        tied = getattr(source.model, "all_tied_weights_keys", {})
        for name, weight in source.weights.items():
            itemsize = self.dtypes[name].itemsize if weight.is_floating_point() else weight.element_size()
            group_dim = self.pruned.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if name in tied and tied[name] in source.weights:
                continue
            if self.codec is None or group_dim is None:
                total += weight.numel() * itemsize
            else:
                rows, columns = weight.shape[1 - group_dim], weight.shape[group_dim]
                total += self.codec.stored_bytes(rows, columns, itemsize)
        return total


def plan_layers(source: Source, format: str, dtype: torch.dtype) -> LayerPlan:
    """Decide layer by layer; UserError if a layer that is recorded as N:M is not, or if none is."""
    codec = codecs().get(format)
    patterns = [source.pattern] + ([codec.pattern] if codec else [])
    recorded = {*source.masks, *source.record.layers}
    selected, _ = select_layers(source.model, recorded=recorded)
    loaded = loaded_dtypes(source.model, dtype)
    plan = LayerPlan(format, codec, {}, {}, {name: loaded.get(name, dtype) for name in source.weights})
    first_fault = None
    for name, layer in selected.items():
        group_dim = 0 if isinstance(layer, Conv1D) else 1
        weight = out_by_in(source.weights[f"{name}.weight"], group_dim).contiguous()
        unfit = next((p.m for p in patterns if p.structured and weight.shape[1] % p.m), None)
        missed = next((pattern for pattern in patterns if not unfit and not pattern.holds(weight)), None)
        if unfit:
            plan.dense[name] = f"in_features={weight.shape[1]} is not a multiple of {unfit}"
        elif missed:
            plan.dense[name] = f"not {missed}"
            first_fault = first_fault or _not_nm(source, name, weight, missed, format)
            if name in recorded:
                raise UserError(_not_nm(source, name, weight, missed, format))
        elif codec and weight.shape[1] % codec.multiple:
            plan.dense[name] = (
                f"{codec.pattern}, but in_features={weight.shape[1]} is not a multiple of {codec.multiple}, so it is "
                "not compressed"
            )
        else:
            plan.pruned[name] = group_dim
    if first_fault and not any(
        name in recorded or bool(source.weights[f"{name}.weight"].any()) for name in plan.pruned
    ):
        raise UserError(first_fault)  # layers that are zero throughout do not make a dense model sparse
    if not plan.pruned:
        name, reason = next(iter(plan.dense.items()))
        raise UserError(
            first_fault or f"No layer can be exported: `{name}`: {reason}. Use another --format or --pattern."
        )
    return plan


def _not_nm(source: Source, name: str, weight: Tensor, pattern: Pattern, format: str) -> str:
    if pattern.structured:
        groups = (weight != 0).unflatten(1, (-1, pattern.m)).sum(-1)
        faulty = int((groups > pattern.n).sum())
        what = f"{faulty:,} of {groups.numel():,} groups of {pattern.m} hold more than {pattern.n} non-zeros."
    else:
        what = f"{int(weight.count_nonzero()):,} of {weight.numel():,} weights are not zero."
    if pattern != source.pattern:
        return (
            f"The {format} format holds {pattern}, but the model is {source.pattern}: in `{name}` {what} Use "
            "--format dense."
        )
    return (
        f"The model is not {pattern}: in `{name}` {what} Prune it first with ast-prune or ast-train, or name its "
        "pattern with --pattern."
    )
