"""Merge a LoRA adapter into an N:M model under its masks, and say what that costs."""

import importlib.util
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ast_sparse.config import SparsityConfig
from ast_sparse.distributed.pieces import refuse_sharded
from ast_sparse.errors import UserError, one_line, shown
from ast_sparse.export.quantizer import CompressedLinear
from ast_sparse.sparsity.kept import nm_layers, plain_name
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.statistics import check_tokens
from ast_sparse.storage import files
from ast_sparse.storage.checksums import CHECKSUMS_NAME
from ast_sparse.storage.origin import source_folder
from ast_sparse.storage.sparsity_record import SparsityRecord
from ast_sparse.tables import layer_kind

_TRAINED_COPY = ".modules_to_save."  # what PEFT trains as a whole is a copy, beside the layer of the base model


@dataclass(frozen=True)
class MergeReport:
    """What a merge under masks lost.

    Attributes:
        errors: by layer with an adapter and a mask, ‖¬m ⊙ W'‖ / ‖W'‖, where W' is the weight merged without the mask.
        losses: mean loss of a token of the texts: `base`, without the adapter; `adapter`, with it; `merged`. Empty
            without texts.
        tokens: how many tokens the losses are over.
    """

    errors: dict[str, float]
    losses: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def lines(self) -> list[str]:
        """A table of the errors by kind of layer, and a line with the losses."""
        kinds: dict[str, list[float]] = {}
        for name, error in self.errors.items():
            kinds.setdefault(layer_kind(name), []).append(error)
        lines = ["what the masks cut off the merged weights, relative error, mean and largest over the blocks:"]
        lines += [f"  {kind}  {sum(each) / len(each):.4f}  {max(each):.4f}" for kind, each in kinds.items()]
        if self.losses:
            shown = ", ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items())
            lines.append(f"loss over {self.tokens:,} tokens: {shown}")
        return lines


@torch.no_grad()
def merge_adapter_sparse(
    model: Any, pattern: str | None = None, samples: Iterable[Tensor] | None = None
) -> tuple[PreTrainedModel, MergeReport]:
    """Merge a PEFT adapter so that N:M layers stay N:M: the new weight is m ⊙ (W + scale · BA).

    What the adapter says about pruned weights is lost; the report says how much that is. Layers that are not N:M are
    merged as PEFT does, and so are other methods than LoRA, before the masks. Of several adapters, the active ones are
    merged. Do not merge SLoRB this way: it stands in for the pruned weights, so the masks would cut off
    what it is there for.

    Args:
        model: a `peft.PeftModel` over a plain model whose weights are N:M; it is changed and must not be used again.
        pattern: N:M of the weights; default: what `sparsity_config.json` of the model's folder says, otherwise 2:4.
        samples: token ids, int64 `[sequences, tokens]` each, for the losses before and after.

    Returns:
        The plain model in evaluation mode, and the report.

    Raises:
        UserError: it is not such a model, it is sharded, its layers are compressed, or its adapter cannot be merged.
    """
    base = _base_model(model)
    folder = source_folder(base.config)
    record = SparsityRecord() if folder is None else SparsityRecord.read(folder)
    checked = Pattern.of(SparsityConfig(pattern=pattern or record.pattern or "2:4"))
    layers = nm_layers(base, checked, record.layers)
    masks = {plain_name(name): layer.weight != 0 for name, layer in layers.items() if _TRAINED_COPY not in name}
    adapted = {plain_name(name) for name in layers if plain_name(name) != name}
    if not adapted:
        raise UserError(f"The adapter changes no {checked} layer. Merge it with PEFT's `merge_and_unload`.")
    model.eval()
    batches = list(samples or ())
    losses = {}
    if batches:
        with model.disable_adapter():
            losses["base"] = _mean_loss(model, batches)
        losses["adapter"] = _mean_loss(model, batches)
    try:
        merged = cast(PreTrainedModel, model.merge_and_unload(safe_merge=True))
    except (AttributeError, ValueError, NotImplementedError) as error:  # prompt tuning, values that are not finite
        reason = one_line(error, end="open")
        raise UserError(f"PEFT cannot merge this adapter: {reason}. Load it beside the model instead.") from error
    errors = {}
    for name, mask in masks.items():
        weight = merged.get_parameter(f"{name}.weight")
        cut = weight.masked_fill(mask, 0)
        if name in adapted:
            whole = float(weight.float().norm())
            errors[name] = float(cut.float().norm()) / whole if whole else 0.0
        weight.masked_fill_(~mask, 0)
    if batches:
        losses["merged"] = _mean_loss(merged, batches)
    return merged.eval(), MergeReport(errors, losses, sum(each.numel() - len(each) for each in batches))


def load_adapter_to_merge(model: PreTrainedModel, adapter: str | Path) -> Any:
    """A PEFT model with the adapter of a folder, for `merge_adapter_sparse`.

    Raises:
        UserError: PEFT is missing, the folder holds no adapter or one that does not fit, or the adapter is SLoRB.
    """
    folder = Path(adapter).expanduser()
    if not (folder / files.ADAPTER_CONFIG_NAME).is_file():
        raise UserError(f"`{adapter}` holds no {files.ADAPTER_CONFIG_NAME}. Name the folder of a PEFT adapter.")
    if (folder / CHECKSUMS_NAME).is_file():  # only `write_adapter` puts it there
        raise UserError(
            f"`{adapter}` is SLoRB, which stands in for the pruned weights: merged under the masks it would lose what "
            "it is there for. Leave it beside the model; an export copies it."
        )
    if importlib.util.find_spec("peft") is None:
        raise UserError("PEFT merges adapters, and it is not installed. Install it: pip install 'ast-sparse[slorb]'.")
    from peft import PeftModel

    try:
        with warnings.catch_warnings(action="ignore"):  # a warning about tensors that are missing is an error below
            adapted = PeftModel.from_pretrained(model, str(folder))
            result = adapted.load_adapter(str(folder), "default")  # again, because only this says what did not fit
    except Exception as error:  # PEFT raises anything about files that do not fit
        reason = one_line(error, end="open")
        raise UserError(f"The adapter `{adapter}` cannot be loaded over this model: {reason}. Check both.") from error
    missing = [key for key in result.missing_keys if ".lora_" in key]  # other methods leave out what layers share
    for what, keys in {"has": result.unexpected_keys, "lacks": missing}.items():
        if keys:
            raise UserError(
                f"The adapter `{adapter}` {what} {shown(keys[0])} (of {len(keys)} such tensors), unlike this model. "
                "Check both."
            )
    return adapted


def _base_model(model: Any) -> PreTrainedModel:
    if importlib.util.find_spec("peft") is not None:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(model, PeftModel):
            base = cast(PreTrainedModel, model.get_base_model())
            if any(isinstance(module, BaseTunerLayer) and module.merged for module in base.modules()):
                raise UserError(
                    "The adapter is merged into the weights already, without masks. Load the base model and the "
                    "adapter again."
                )
            if any(isinstance(module, CompressedLinear) for module in base.modules()):
                raise UserError(
                    "Cannot merge into layers that are compressed in memory. Load the base model without "
                    "`dequantize=False`."
                )
            refuse_sharded(base, "Merge before it is sharded, or merge the folder of a saved adapter.")
            return base
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            "The adapter was loaded into the model, as SLoRB is, and SLoRB must stay beside the model. For LoRA, use "
            "`peft.PeftModel.from_pretrained(base, adapter)`."
        )
    raise UserError(f"Cannot merge the adapter of a {type(model).__name__}. Give a `peft.PeftModel`.")


def _mean_loss(model: Any, batches: list[Tensor]) -> float:
    """The mean cross-entropy of a predicted token, a sequence at a time."""
    total, count = 0.0, 0
    for batch in batches:
        check_tokens(model, batch)
    for row in (row.to(model.device)[None] for batch in batches for row in batch):
        logits = model(input_ids=row).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
        count += row.numel() - 1
    return total / count
