"""ast-export: write an N:M model as a compressed or dense checkpoint, and measure the bits that positions cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ast_sparse.cli.calibration import calibration_text, sequence_options
from ast_sparse.cli.command import Command, settings_as_options
from ast_sparse.cli.options import check_effect, check_json_file, find_device, write_json_file
from ast_sparse.config import CalibrationConfig, SparsityConfig
from ast_sparse.config.data import BOS_CHOICES
from ast_sparse.export.formats import CALIBRATED, FORMAT_HELP

if TYPE_CHECKING:
    from torch import Tensor

    from ast_sparse.export.position_cost import CompressionTable

_TEXT_OPTIONS = ("text_field", "samples", "seq_len", "seed", "bos", "device")
_ONLY_EXPORT = ("format_", "dtype", "overwrite", "merge_adapter", "push_to_hub")
_SETTINGS = {  # the option for each setting
    "sparsity.pattern": "--pattern",
    "calibration.data": "--calibration",
    "calibration.samples": "--samples",
    "calibration.seq_len": "--seq-len",
    "calibration.seed": "--seed",
    "push_to_hub": "--push-to-hub",
}
_ONLY_TABLE = ("value_bits", "json_file")
_SEQUENCES, _SEQUENCE = 64, 512  # of --merge-text: how many at most, and their tokens


@click.command(cls=Command)
@click.argument("checkpoint", metavar="MODEL")
@click.argument("out", metavar="[OUT]", required=False)
@click.option(
    "--format", "format_", type=click.Choice(list(FORMAT_HELP)), default="compressed", show_default=True,
    help=" ".join(f"{name}: {text}." for name, text in FORMAT_HELP.items()),
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True,
    help="Dtype of the written weights.",
)  # fmt: skip
@click.option(
    "--pattern",
    metavar="N:M",
    help="Pattern to check; default: the one in the checkpoint's sparsity_config.json, otherwise 2:4 (with "
    "--table, the one found from the zeros).",
)
@click.option("--overwrite", is_flag=True, help="Replace the model in OUT.")
@click.option(
    "--merge-adapter", metavar="FOLDER",
    help="Merge a LoRA adapter of MODEL under its masks: pruned weights stay zero. Prints what that costs.",
)  # fmt: skip
@click.option(
    "--merge-text", multiple=True, metavar="FILE",
    help="With --merge-adapter: a text (txt, JSONL, parquet) to print the loss of before and after. May be repeated.",
)  # fmt: skip
@click.option(
    "--push-to-hub", metavar="REPO_ID",
    help="Upload OUT to this repository of the Hugging Face hub (USER/NAME), which is created if there is none.",
)  # fmt: skip
@click.option("--private", is_flag=True, help="With --push-to-hub: make the repository private.")
@click.option(
    "--calibration", multiple=True, metavar="FILE",
    help="compressed-int4: text to choose the scales by, a text, JSONL or parquet file; repeatable. none: round "
    "without text.",
)  # fmt: skip
@sequence_options
@click.option(
    "--bos", type=click.Choice(BOS_CHOICES), default="auto", show_default=True,
    help="BOS in the calibration text, as in ast-prune.",
)  # fmt: skip
@click.option(
    "--device", default="auto", show_default=True,
    help="Where blocks are calibrated, one at a time: cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.",
)  # fmt: skip
@click.option(
    "--table", is_flag=True,
    help="Print the cost of the positions of kept weights in 1:2, 2:4, 4:8, 8:16 and 16:32 with bitmask, index, "
    "combinatorial and Huffman codes, measured on the masks of MODEL, next to the bounds.",
)  # fmt: skip
@click.option(
    "--value-bits", type=click.IntRange(1, 32), default=4, show_default=True,
    help="With --table: bits per kept value.",
)  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with MODEL.")
@click.option("--json", "json_file", metavar="FILE", help="With --table: write all results to this file too.")
@click.pass_context
def main(context: click.Context, checkpoint: str, out: str | None, table: bool, **options: Any) -> None:
    """Write the N:M model in the folder MODEL to the folder OUT.

    MODEL is a checkpoint or the output of ast-train, an export, or any checkpoint whose weights are N:M. The files are
    read back and verified, then a table of sizes is printed. A failed or interrupted export leaves OUT as it was.

    With --table, OUT is optional, and MODEL may be a hub id, a .gguf file or a dense model, whose masks are then made
    by magnitude.
    """
    _check_usage(context, out, table)
    calibration = _check_settings(options)
    from ast_sparse.export.export import export_model  # takes seconds, so --help does without it
    from ast_sparse.export.slorb_hint import serving_hint
    from ast_sparse.storage.files import require_model_folder
    from ast_sparse.storage.save import check_out_dir

    json_file, pattern = options["json_file"], options["pattern"]
    if json_file is not None:
        check_json_file(Path(json_file))
    if out is not None and (table or calibration is not None):  # counting and calibrating take minutes
        folder = Path(checkpoint).expanduser()
        require_model_folder(folder)
        check_out_dir(Path(out).expanduser().resolve(), folder.resolve(), options["overwrite"])
    samples = device = None
    if out is not None and calibration is not None:
        device = find_device(options["device"])
        samples = _samples(checkpoint, calibration, options)
    found = _count(checkpoint, pattern, options["value_bits"], options["trust_remote_code"]) if table else None
    if found is not None:
        click.echo("\n".join([f"{checkpoint}", *found.lines()]))
    if out is not None:
        with settings_as_options(_SETTINGS):
            report = export_model(
                checkpoint, out, options["format_"], dtype=options["dtype"], pattern=pattern,
                overwrite=options["overwrite"], progress=True, trust_remote_code=options["trust_remote_code"],
                adapter=options["merge_adapter"], adapter_samples=_merge_samples(checkpoint, options),
                samples=samples, device=device,
                push_to_hub=options["push_to_hub"], private=options["private"],
            )  # fmt: skip
        hint = serving_hint(Path(out).expanduser(), report.format != "dense")
        click.echo("\n".join([*report.lines(), *([hint] if hint else []), f"Wrote {report.out_dir}"]))
        if report.uploaded is not None:
            click.echo(f"Uploaded to {report.uploaded}")
    if found is not None and json_file is not None:
        from ast_sparse.storage.versions import versions

        write_json_file(Path(json_file), {"model": checkpoint, **found.to_dict(), "versions": versions()})


def _check_usage(context: click.Context, out: str | None, table: bool) -> None:
    """Refuse options that would have no effect."""
    if out is None and not table:
        raise click.UsageError("Missing argument 'OUT', the folder to write. Name one, or add --table.")
    files = [name for name in context.params["calibration"] if name != "none"]
    rounded, rounding = out is not None and context.params["format_"] in CALIBRATED, " or ".join(CALIBRATED)
    needs: dict[str, tuple[bool, tuple[str, ...]]] = {
        "--table": (table, _ONLY_TABLE),
        "OUT": (out is not None, _ONLY_EXPORT),
        f"--format {rounding}": (rounded, ("calibration",)),
        "--merge-adapter": (context.params["merge_adapter"] is not None, ("merge_text",)),
        "--push-to-hub": (context.params["push_to_hub"] is not None, ("private",)),
        "--calibration FILE": (rounded and bool(files), _TEXT_OPTIONS),
    }
    check_effect(context, needs)
    if rounded and not context.params["calibration"]:
        raise click.UsageError(
            f"--format {context.params['format_']} needs text to calibrate on. Give --calibration FILE, or "
            "--calibration none to round to the nearest step."
        )
    if files and len(files) < len(context.params["calibration"]):
        raise click.UsageError(f"--calibration names none and {files[0]}. Drop one of them.")


def _check_settings(options: dict[str, Any]) -> CalibrationConfig | None:
    """Check the values of settings; those of the calibration, or None without text."""
    data = [name for name in options["calibration"] if name != "none"]
    with settings_as_options(_SETTINGS):
        SparsityConfig(pattern=options["pattern"] or "2:4")
        if not data:
            return None
        return CalibrationConfig(data=tuple(data), **{key: options[key] for key in ("samples", "seq_len", "seed")})


def _samples(checkpoint: str, config: CalibrationConfig, options: dict[str, Any]) -> Tensor:
    from ast_sparse.storage.locate import load_model_config, load_tokenizer

    trusted = options["trust_remote_code"]
    with settings_as_options(_SETTINGS):
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trusted)
        model_config = load_model_config(checkpoint, trust_remote_code=trusted)
        return calibration_text(config, tokenizer, model_config, options["text_field"], options["bos"])


def _merge_samples(checkpoint: str, options: dict[str, Any]) -> Tensor | None:
    """The first sequences of --merge-text, `[sequences, tokens]`; None without texts."""
    if not options["merge_text"]:
        return None
    import torch

    from ast_sparse.data.calibration import calibration_blocks
    from ast_sparse.evaluation.perplexity import max_positions
    from ast_sparse.storage.locate import load_model_config, load_tokenizer

    trusted = options["trust_remote_code"]
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trusted)
    limit = max_positions(load_model_config(checkpoint, trust_remote_code=trusted))
    length = min(_SEQUENCE, limit or _SEQUENCE)
    blocks = calibration_blocks(options["merge_text"], None, "text", tokenizer, length, "--merge-text")
    return torch.tensor(blocks[:_SEQUENCES]["input_ids"])


def _count(name: str, pattern: str | None, value_bits: int, trust_remote_code: bool) -> CompressionTable:
    from transformers.pytorch_utils import Conv1D

    from ast_sparse.export.position_cost import Layer, half_of, measure_positions
    from ast_sparse.sparsity.masks import Pattern
    from ast_sparse.sparsity.model import select_layers
    from ast_sparse.storage.load import load_checkpoint
    from ast_sparse.storage.sparsity_record import SparsityRecord

    folder = Path(name).expanduser()
    recorded = SparsityRecord.read(folder)
    known = pattern or recorded.pattern
    own = None if known is None else Pattern.of(SparsityConfig(pattern=known))
    if own is not None:
        half_of(own)  # before the weights are loaded
    checkpoint = load_checkpoint(name, dtype="auto", trust_remote_code=trust_remote_code)
    layers = {}
    pruned = {*checkpoint.masks, *recorded.layers}
    for key, layer in select_layers(checkpoint.model, recorded=pruned)[0].items():
        weight, mask = layer.weight.detach(), checkpoint.masks.get(key)
        if isinstance(layer, Conv1D):
            weight, mask = weight.t().contiguous(), None if mask is None else mask.t().contiguous()
        layers[key] = Layer(weight, mask)
    return measure_positions(layers, own, pruned=pruned, value_bits=value_bits, progress=True)


if __name__ == "__main__":
    main()
