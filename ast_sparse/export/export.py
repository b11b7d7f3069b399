"""Export an N:M model: plan the layers, write, read back, verify, move into place."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ast_sparse.errors import UserError
from ast_sparse.export.awq.rounding import round_copy
from ast_sparse.export.card_subject import Subject, shareable, shareable_values
from ast_sparse.export.formats import CALIBRATED, FORMAT_HELP
from ast_sparse.export.hub import check_push, push_folder
from ast_sparse.export.layer_plan import LayerPlan, plan_layers
from ast_sparse.export.model_card import write_card
from ast_sparse.export.quantizer import AstSparse24Config
from ast_sparse.export.readback import same_pairs
from ast_sparse.export.source import Source, open_source
from ast_sparse.export.summary import ExportReport, SizeRow, file_sizes
from ast_sparse.kernels.code24 import same_bits
from ast_sparse.progress import progress_bar
from ast_sparse.sparsity.layers import out_by_in
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.storage import files
from ast_sparse.storage.load import load_checkpoint
from ast_sparse.storage.origin import check_saving
from ast_sparse.storage.save import check_out_dir, finished_folder, save_weights
from ast_sparse.storage.slorb_adapter import common_group_dim, write_adapter
from ast_sparse.storage.space import check_space
from ast_sparse.storage.sparsity_record import SparsityRecord

__all__ = ["DTYPES", "ExportReport", "export_model"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_model(
    model_or_dir: PreTrainedModel | str | Path,
    out_dir: str | Path,
    format: str = "compressed",
    *,
    dtype: str = "bfloat16",
    pattern: str | None = None,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
    record: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    adapter_samples: Tensor | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    samples: Tensor | None = None,
    device: torch.device | None = None,
) -> ExportReport:
    """Write an N:M model in an export format; the files are read back and verified before the folder gets its name.

    Args:
        model_or_dir: a model with sparse layers, a plain model whose weights are N:M, or a folder: one of our training
            checkpoints, an export, or any checkpoint of an N:M model. A model object is not changed.
        out_dir: folder to write. An interrupted or failed export leaves it as it was.
        format: `dense`, an ordinary checkpoint of any N:M; or a compressed one of `formats`, for the N:M of its codec.
        dtype: of the weights: bfloat16, float16 or float32.
        pattern: N:M to check against; default: what `sparsity_config.json` or the sparse layers say, else 2:4.
        overwrite: replace a model that `out_dir` holds.
        tokenizer: saved with the model. The files beside the source's weights (tokenizer files, templates, code,
            generation_config.json) are copied as they are.
        progress: show a progress bar.
        record: how a model object was made, for `sparsity_config.json`.
        trust_remote_code: run code that comes with a folder.
        adapter: folder of a LoRA adapter, merged under the masks into the model of a folder.
        adapter_samples: token ids `[sequences, tokens]`, int64, to report the loss before and after merging.
        push_to_hub: id of a repository on the hub to upload the export to, created if there is none.
        private: make that repository private.
        samples: `[sequences, tokens]` int64, text that a format with few bits is calibrated on by AWQ; without it
            weights are rounded to the nearest step. Other formats need none.
        device: where calibration runs, block by block; default: where the model is.

    Raises:
        UserError: the source is not a model, is sharded or not N:M, the output folder is taken or has no room, or the
            files read back differ; or the finished export cannot be uploaded.
    """
    out, folder = _check_arguments(model_or_dir, out_dir, format, dtype, overwrite, adapter, push_to_hub)
    _check_samples(format, samples, adapter, adapter_samples)
    rounds = format in CALIBRATED
    source = open_source(
        model_or_dir, folder, pattern, record or {}, trust_remote_code, adapter, adapter_samples, in_float32=rounds
    )
    plan = plan_layers(source, format, DTYPES[dtype])
    check_space(out, plan.stored_bytes(source))
    model = source.model
    generation = getattr(model, "generation_config", None)
    check_saving(str(folder or type(model).__name__), model.config, generation, tokenizer)
    if rounds:
        source, plan = _round(source, plan, DTYPES[dtype], samples, device, progress)
    recorded = _record(source, plan)
    with finished_folder(out) as partial:
        _write(source, plan, recorded, partial, DTYPES[dtype], push_to_hub or str(out_dir), progress)
        source.origin.complete(partial, tokenizer)
        nonzero = _verify(source, plan, partial, DTYPES[dtype], progress)
        report = _report(source, plan, partial, out, dtype, nonzero)
        subject = Subject.of(model, recorded, folder, source.origin.folder, plan.pruned, source.slorb, push_to_hub)
        write_card(partial, subject, report)
        report = replace(report, files=file_sizes(partial))
    if push_to_hub is not None:
        report = replace(report, uploaded=push_folder(out, push_to_hub, private))
    return report


def _check_arguments(
    model_or_dir: Any,
    out_dir: str | Path,
    format: str,
    dtype: str,
    overwrite: bool,
    adapter: str | Path | None,
    push_to_hub: str | None,
) -> tuple[Path, Path | None]:
    """What can be refused before anything is read; the folder to write, and that of the model."""
    if format not in FORMAT_HELP:
        raise UserError(f"Unknown export format {format!r}. Use {' or '.join(FORMAT_HELP)}.")
    if dtype not in DTYPES:
        raise UserError(f"Unknown export dtype {dtype!r}. Use one of {', '.join(DTYPES)}.")
    if push_to_hub is not None:
        check_push(push_to_hub)
    out = Path(out_dir).expanduser().resolve()
    folder = None if isinstance(model_or_dir, nn.Module) else Path(model_or_dir).expanduser()
    check_out_dir(out, folder.resolve() if folder else None, overwrite)
    if folder is None and adapter is not None:
        raise UserError("adapter: merge it into the model object with `merge_adapter_sparse`, or give a folder.")
    return out, folder


def _check_samples(
    format: str, samples: Tensor | None, adapter: str | Path | None, adapter_samples: Tensor | None
) -> None:
    """Refuse text that would have no effect."""
    if samples is not None and format not in CALIBRATED:
        raise UserError(f"samples: only {' or '.join(CALIBRATED)} is calibrated. Use this format, or no samples.")
    if samples is not None and (samples.dim() != 2 or not samples.numel()):
        raise UserError(f"samples: the shape is {tuple(samples.shape)}. Give token ids [sequences, tokens].")
    if adapter_samples is not None and adapter is None:
        raise UserError("adapter_samples: there is no adapter to merge. Name its folder, or drop adapter_samples.")


def _round(
    source: Source,
    plan: LayerPlan,
    dtype: torch.dtype,
    samples: Tensor | None,
    device: torch.device | None,
    progress: bool,
) -> tuple[Source, LayerPlan]:
    """The source with the weights and SLoRB pairs that the codec can hold, and the plan with their scales."""
    in_place, codec = source.folder is not None, plan.codec
    assert codec is not None, "it rounds"
    weights, rounded = round_copy(
        source.model, plan.pruned, source.slorb, plan.dtypes, dtype, samples, device, progress, in_place, codec
    )
    return replace(source, weights=weights, slorb=rounded.slorb), replace(plan, rounded=rounded)


def _record(source: Source, plan: LayerPlan) -> SparsityRecord:
    """The record of the source, and what the export did to its weights."""
    record = source.record
    if source.adapter is not None:
        record = record.with_adapter(shareable(source.adapter))
    return record if plan.rounded is None else record.with_rounding(plan.rounded.record())


def _write(
    source: Source,
    plan: LayerPlan,
    recorded: SparsityRecord,
    folder: Path,
    dtype: torch.dtype,
    name: str,
    progress: bool,
) -> None:
    codec = plan.codec
    tensors: dict[str, Tensor] = {}
    cast = _cast_weights(source, plan)
    for key, value in progress_bar(cast, "Encoding", len(source.weights), disable=not progress, unit="tensor"):
        layer = key.removesuffix(".weight")
        if codec and layer in plan.pruned and key != layer:
            group_dim = plan.pruned[layer]
            mask = _code_mask(source.masks.get(layer), group_dim, codec.pattern)
            scales = [] if plan.rounded is None else [plan.rounded.scales[layer]]
            stored = codec.encode(out_by_in(value, group_dim).contiguous(), mask, *scales)
            tensors |= {f"{layer}.{part}": tensor for part, tensor in zip(codec.names, stored, strict=True)}
        else:
            tensors[key] = value
    # Compressed layers have the names and shapes of the model in memory, so they must not be converted.
    save_weights(source.model, folder, tensors, original_format=codec is None)
    _edit_config(folder, plan, dtype)
    if source.slorb:
        pairs = {key: (s.to("cpu", dtype), x.to("cpu", dtype)) for key, (s, x) in source.slorb.items()}
        write_adapter(folder / files.ADAPTER_FOLDER, name, pairs, common_group_dim(source.model, pairs))
    record = recorded.to_dict()
    if source.folder is None or not source.record.content:
        record = SparsityRecord.of_export(
            pattern=str(source.pattern), has_slorb=bool(source.slorb), layers=plan.pruned, more=record
        ).to_dict()
    files.write_json(folder / files.SPARSITY_CONFIG_NAME, shareable_values(record))


def _cast_weights(source: Source, plan: LayerPlan) -> Iterator[tuple[str, Tensor]]:
    """The masked weights in the dtypes of the export, on the CPU; pruned layers have no negative zeros."""
    parameters = {name for name, _ in source.model.named_parameters(remove_duplicate=False)}
    for name, stored in source.weights.items():
        dtype = plan.dtypes[name]
        value = stored.to("cpu", dtype) if stored.is_floating_point() else stored.cpu()
        if name in parameters and not bool(value.isfinite().all()):
            if bool(stored.isfinite().all()):
                raise UserError(f"`{name}` holds values too large for {dtype}. Export with --dtype bfloat16.")
            raise UserError(f"`{name}` holds values that are not finite. Export an earlier checkpoint.")
        if name.removesuffix(".weight") in plan.pruned and name.endswith(".weight"):
            value = torch.where(value != 0, value, 0)
        yield name, value


def _code_mask(mask: Tensor | None, group_dim: int, pattern: Pattern) -> Tensor | None:
    """The mask to encode with; None if it does not keep exactly N of M, and the non-zeros are used instead."""
    if mask is None:
        return None
    mask = out_by_in(mask.cpu(), group_dim).contiguous()
    return mask if bool((mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all()) else None


def _edit_config(folder: Path, plan: LayerPlan, dtype: torch.dtype) -> None:
    config = files.read_json(folder / files.CONFIG_NAME)
    _name_dtype(config, str(dtype).removeprefix("torch."))
    config.pop("quantization_config", None)
    if plan.codec:
        config["quantization_config"] = AstSparse24Config.of(plan.codec, sorted(plan.pruned)).to_dict()
    files.write_json(folder / files.CONFIG_NAME, config)


def _name_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set `dtype` of a configuration and of the models inside it (`text_config`, `vision_config`)."""
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            _name_dtype(value, dtype)


def _verify(source: Source, plan: LayerPlan, folder: Path, dtype: torch.dtype, progress: bool) -> int:
    """Compare what is read back with the masked weights; return the number of non-zeros in the pruned layers."""
    fault = f"Reading the export back failed, so nothing was kept: `{folder.name}`"
    remote_code = bool(source.model.is_remote_code())
    written = load_checkpoint(folder, dtype=dtype, trust_remote_code=remote_code)
    found, pairs = written.model.state_dict(), written.slorb
    if not same_pairs(pairs, source.slorb, dtype):
        raise UserError(f"{fault}: the SLoRB adapter differs.")
    nonzero = 0
    cast = _cast_weights(source, plan)
    for name, value in progress_bar(cast, "Verifying", len(source.weights), disable=not progress, unit="tensor"):
        if found[name].dtype != value.dtype or not same_bits(found[name], value):
            raise UserError(f"{fault}: `{name}` differs from the masked weight.")
        layer = name.removesuffix(".weight")
        if layer in plan.pruned and layer != name:
            nonzero += int(found[name].count_nonzero())
            if not source.pattern.holds(found[name], dim=plan.pruned[layer]):
                raise UserError(f"{fault}: `{name}` is not {source.pattern}.")
    return nonzero


def _report(source: Source, plan: LayerPlan, folder: Path, out_dir: Path, dtype: str, nonzero: int) -> ExportReport:
    item = {name: plan.dtypes[f"{name}.weight"].itemsize for name in (*plan.pruned, *plan.dense)}
    entries = {name: source.weights[f"{name}.weight"].numel() for name in (*plan.pruned, *plan.dense)}
    shapes = {key: value for file in files.weight_files(folder) for key, value in files.tensor_shapes(file).items()}
    sizes = {key: files.stored_bytes(*value) for key, value in shapes.items()}
    pruned = sum(entries[name] for name in plan.pruned)
    pruned_bytes = stored = sum(entries[name] * item[name] for name in plan.pruned)
    kept, codes = pruned, 0
    if plan.codec:
        parts = [f"{name}.{part}" for name in plan.pruned for part in plan.codec.names]
        stored = sum(sizes[part] for part in parts)
        kept = sum(math.prod(shapes[part][1]) for part in parts)
        codes = len(parts) - len(plan.pruned)
        rows = {name: source.weights[f"{name}.weight"].shape[1 - dim] for name, dim in plan.pruned.items()}
        if stored != sum(
            plan.codec.stored_bytes(rows[name], entries[name] // rows[name], item[name]) for name in plan.pruned
        ):
            raise UserError(
                f"Reading the export back failed, so nothing was kept: the pruned layers take {stored} bytes."
            )
    dense = sum(entries[name] for name in plan.dense)
    dense_bytes = sum(entries[name] * item[name] for name in plan.dense)
    rest = sum(sizes.values()) - stored - dense_bytes
    pairs = [pair for name, pair in source.slorb.items() if name in entries]  # shared pairs once
    adapter = sum(s.numel() + x.numel() for s, x in pairs)
    rest_entries = sum(math.prod(shape) for _, shape in shapes.values()) - kept - dense
    itemsize = DTYPES[dtype].itemsize
    others = (
        SizeRow("left dense", len(plan.dense), dense, dense_bytes, dense_bytes),
        SizeRow("SLoRB", 2 * len(pairs), adapter, adapter * itemsize, adapter * itemsize),
        SizeRow("embeddings, norms, head", len(sizes) - len(entries) - codes, rest_entries, rest, rest),
    )
    return ExportReport(
        out_dir=out_dir,
        format=plan.format,
        dtype=dtype,
        pattern=str(source.pattern),
        pruned=SizeRow(f"pruned ({source.pattern})", len(plan.pruned), pruned, pruned_bytes, stored),
        others=others,
        dense_layers=plan.dense,
        nonzero_share=nonzero / pruned,
        notes=_notes(plan, 8 * stored / pruned),
        files=file_sizes(folder),
        merge=source.merge,
    )


def _notes(plan: LayerPlan, bits: float) -> tuple[str, ...]:
    """Bits of a pruned weight beside the paper's formula, and what rounding did."""
    if plan.codec is None:
        return ()
    itemsize = next(plan.dtypes[f"{name}.weight"].itemsize for name in plan.pruned)
    coded, formula = plan.codec.bits(itemsize)
    scales, without = "", ""
    if plan.codec.scale_columns:
        scales, without = f", {bits - coded:.3f} of them for scales", ", without scales"
    line = f"bits for each pruned weight: {bits:.3f}{scales}; the paper's formula{without}: {formula:.3f}"
    return (line, *(plan.rounded.lines() if plan.rounded is not None else ()))
