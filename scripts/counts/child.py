"""What `traffic.py` counts, in a process of its own: `python -m scripts.counts.child [--code CHECKOUT] [--quick]`.

Prints JSON: commit and versions of the code, and its counts by case. `--code` takes `ast_sparse` from another checkout;
what counts is always this one.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import click

# layers, tokens of a micro-batch, vocabulary
SHAPES = {"SmolLM2-135M, 8 x 2048": (30, 8 * 2048, 49152), "LLaMA2-7B, 1 x 4096": (32, 4096, 32000)}
QUICK = {"tiny": (1, 4096, 32000)}


def counts(is_quick: bool) -> dict[str, dict[str, float]]:
    """All counts of the code, by case."""
    from scripts.counts import micro_batch
    from scripts.counts.cases import compiled_loss, layer, loss_counts, rows
    from scripts.counts.decoder import micro_batch_launches

    found: dict[str, dict[str, float]] = {}
    for accumulation in (1, 4):
        for checkpointing in (False, True):
            name = f"accumulation {accumulation}{', checkpointing' if checkpointing else ''}"
            for side in ("masked", "dense"):
                moved, kernels = layer(side == "masked", accumulation, checkpointing)
                found.setdefault(name, {}).update({side: moved, f"kernels, {side}": kernels})
    found["rows of FSDP2"] = {"masked": rows(True), "dense": rows(False)}
    found["loss"], found["plain loss"] = loss_counts("ours"), loss_counts("plain")
    with patch.dict(os.environ, AST_SPARSE_GPU="plain"):
        found["eager loss"] = loss_counts("ours")
    found["compiled loss"] = {} if is_quick else compiled_loss()
    for name, (layers, tokens, vocab) in (QUICK if is_quick else QUICK | SHAPES).items():
        found[f"micro-batch, {name}"] = micro_batch.ours(layers, tokens, vocab)
        found[f"plain micro-batch, {name}"] = micro_batch.plain(layers, has_loss=True)
        found[f"models alone, {name}"] = micro_batch.plain(layers, has_loss=False)
        found[f"loss, {name}"] = micro_batch.loss_kernels(tokens, vocab)
        compiled = {} if name in QUICK else micro_batch_launches(name, layers, tokens, vocab)
        found[f"compiled micro-batch, {name}"] = compiled
    return found


def use_code(checkout: Path) -> None:
    """Import `ast_sparse` from a checkout."""
    sys.path.insert(0, str(checkout))
    try:
        import ast_sparse
    finally:
        sys.path.remove(str(checkout))
    if not Path(str(ast_sparse.__file__)).resolve().is_relative_to(checkout.resolve()):
        raise click.ClickException(f"--code {checkout} has no ast_sparse.")


@click.command(help=__doc__)
@click.option("--code", type=click.Path(exists=True, path_type=Path), help="Checkout whose ast_sparse is counted.")
@click.option("--quick", is_flag=True, help="One tiny micro-batch.")
def main(code: Path | None, quick: bool) -> None:
    # before torch is imported
    os.environ |= {"TRITON_INTERPRET": "1", "AST_SPARSE_CPU": "plain", "AST_SPARSE_GPU": "auto", "HF_HUB_OFFLINE": "1"}
    if code is not None:
        use_code(code)
    from scripts.counts.cases import as_on_gpu
    from scripts.provenance import provenance

    as_on_gpu()
    made_with = provenance() if code is None else provenance(code)
    del made_with["device"]  # nothing here depends on it
    with contextlib.redirect_stdout(sys.stderr):  # what a training prints
        found = counts(quick)
    click.echo(json.dumps({**made_with, "counts": found}, indent=1))


if __name__ == "__main__":
    main()
