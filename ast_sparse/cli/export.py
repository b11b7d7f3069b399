"""ast-export: write an N:M model as a compressed or dense checkpoint."""

import click

from ast_sparse.cli.command import Command


@click.command(cls=Command)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("out", metavar="OUT")
@click.option(
    "--format", "format_", type=click.Choice(["dense", "compressed"]), default="compressed", show_default=True,
    help="compressed: 2:4 only, values and positions, read by transformers after `import ast_sparse`. "
    "dense: zeros written out, any N:M, read by everything.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True,
    help="Type of the weights written.",
)  # fmt: skip
@click.option(
    "--pattern",
    metavar="N:M",
    help="Pattern to check; default: what the checkpoint's sparsity_config.json says, or 2:4.",
)
@click.option("--overwrite", is_flag=True, help="Replace the model that OUT holds.")
def main(checkpoint: str, out: str, format_: str, dtype: str, pattern: str | None, overwrite: bool) -> None:
    """Write the N:M model in the folder CHECKPOINT to the folder OUT.

    CHECKPOINT is a checkpoint or the result of ast-train, an export, or any checkpoint whose weights are N:M. The files
    are read back and verified, then a table of sizes is printed. A failed or interrupted export leaves OUT as it was.
    """
    from ast_sparse.export.checkpoint import export_model  # takes seconds: not for --help

    report = export_model(checkpoint, out, format_, dtype=dtype, pattern=pattern, overwrite=overwrite, progress=True)
    click.echo("\n".join(report.lines()))
    click.echo(f"Wrote {report.out_dir}")


if __name__ == "__main__":
    main()
