"""ast-export: write an N:M model as a compressed or dense checkpoint, and measure the bits that positions cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ast_sparse.cli.command import Command, settings_as_options
from ast_sparse.cli.options import check_json_file, write_json_file
from ast_sparse.config import SparsityConfig
from ast_sparse.export.formats import FORMAT_HELP

if TYPE_CHECKING:
    from torch import Tensor

    from ast_sparse.export.position_cost import CompressionTable

_ONLY_EXPORT = ("format_", "dtype", "overwrite", "merge_adapter", "merge_text", "push_to_hub")
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
    _check_pattern(options["pattern"])
    from ast_sparse.export.export import export_model  # takes seconds, so --help does without it
    from ast_sparse.serving.slorb_serving import serving_hint
    from ast_sparse.storage.files import require_model_folder
    from ast_sparse.storage.save import check_out_dir

    json_file, pattern = options["json_file"], options["pattern"]
    if json_file is not None:
        check_json_file(Path(json_file))
    if table and out is not None:  # counting takes minutes
        folder = Path(checkpoint).expanduser()
        require_model_folder(folder)
        check_out_dir(Path(out).expanduser().resolve(), folder.resolve(), options["overwrite"])
    found = _count(checkpoint, pattern, options["value_bits"], options["trust_remote_code"]) if table else None
    if found is not None:
        click.echo("\n".join([f"{checkpoint}", *found.lines()]))
    if out is not None:
        samples = _samples(checkpoint, options["merge_text"], options["trust_remote_code"])
        with settings_as_options({"push_to_hub": "--push-to-hub"}):
            report = export_model(
                checkpoint, out, options["format_"], dtype=options["dtype"], pattern=pattern,
                overwrite=options["overwrite"], progress=True, trust_remote_code=options["trust_remote_code"],
                adapter=options["merge_adapter"], adapter_samples=samples,
                push_to_hub=options["push_to_hub"], private=options["private"],
            )  # fmt: skip
        hint = serving_hint(Path(out), report.format != "dense")
        click.echo("\n".join([*report.lines(), *([hint] if hint else []), f"Wrote {report.out_dir}"]))
        if options["push_to_hub"] is not None:
            click.echo(f"Uploaded to https://huggingface.co/{options['push_to_hub']}")
    if found is not None and json_file is not None:
        from ast_sparse.storage.versions import versions

        write_json_file(Path(json_file), {"model": checkpoint, **found.to_dict(), "versions": versions()})


def _check_usage(context: click.Context, out: str | None, table: bool) -> None:
    """Refuse options that would have no effect."""
    if out is None and not table:
        raise click.UsageError("Missing argument 'OUT', the folder to write. Name one, or add --table.")
    if context.params["private"] and context.params["push_to_hub"] is None:
        raise click.UsageError("--private does nothing without --push-to-hub. Add --push-to-hub, or drop it.")
    ignored = (() if table else _ONLY_TABLE) + (() if out is not None else _ONLY_EXPORT)
    if context.params["merge_text"] and not context.params["merge_adapter"]:
        raise click.UsageError("--merge-text does nothing without --merge-adapter. Add it, or drop --merge-text.")
    for option in context.command.params:
        if option.name in ignored and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            need = "OUT" if option.name in _ONLY_EXPORT else "--table"
            value = context.params[option.name]
            raise click.UsageError(f"{option.opts[0]} ({value}) has no effect without {need}. Add {need} or drop it.")


def _samples(checkpoint: str, texts: tuple[str, ...], trust_remote_code: bool) -> Tensor | None:
    """The first sequences of the texts, `[sequences, tokens]`; None without texts."""
    if not texts:
        return None
    import torch

    from ast_sparse.data.calibration import calibration_blocks
    from ast_sparse.evaluation.perplexity import max_positions
    from ast_sparse.storage.locate import load_model_config, load_tokenizer

    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    limit = max_positions(load_model_config(checkpoint, trust_remote_code=trust_remote_code))
    length = min(_SEQUENCE, limit or _SEQUENCE)
    blocks = calibration_blocks(texts, None, "text", tokenizer, length, "--merge-text")
    return torch.tensor(blocks[:_SEQUENCES]["input_ids"])


def _check_pattern(pattern: str | None) -> None:
    with settings_as_options({"sparsity.pattern": "--pattern"}):
        SparsityConfig(pattern=pattern or "2:4")


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
