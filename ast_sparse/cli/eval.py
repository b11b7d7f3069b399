"""ast-eval: perplexity of one or several models on WikiText-2 or a text file."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ast_sparse.cli.command import Command
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    import torch

    from ast_sparse.evaluation.perplexity import PerplexityResult

WIKITEXT2 = "wikitext2"
_ONLY_WIKITEXT2 = ("split", "data_dir")


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The command line, parsed."""

    dataset: str
    split: str
    data_dir: str | None
    text_field: str
    seq_len: int | None
    limit: int | None
    dtype: str | None
    device: str
    tokenizer: str | None
    revision: str | None
    gguf_file: str | None
    attn_implementation: str | None
    trust_remote_code: bool


@click.command(cls=Command)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--dataset",
    default=WIKITEXT2,
    show_default=True,
    metavar="wikitext2|FILE",
    help="WikiText-2, or a file of text, JSONL or parquet; documents are joined by a blank line.",
)
@click.option(
    "--split",
    type=click.Choice(["test", "validation"]),
    default="test",
    show_default=True,
    help="Split of WikiText-2; figures are published on test.",
)
@click.option(
    "--data-dir", metavar="DIR", help="Folder with wiki.test.raw (wiki.valid.raw), or such a file, instead of the hub."
)
@click.option("--text-field", default="text", show_default=True, help="Field of a JSONL or parquet file with the text.")
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    help="Tokens of a window. Default: the published window of the model's family (GPT-2 1024, OPT 2048, LLaMA2 4096, "
    "others 2048), at most the model's positions.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Measure only the first so many windows. Default: all.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    help="Weights and activations; auto is the dtype the checkpoint is stored in. Default: float32 on a CPU, auto on a "
    "GPU. The loss is float32 in every case.",
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."
)
@click.option("--json", "json_file", metavar="FILE", help="Write the figures, settings and versions here as well.")
@click.option("--tokenizer", metavar="MODEL", help="Take the tokenizer from here. Default: from each MODEL.")
@click.option("--revision", help="Branch, tag or commit of a MODEL on the hub.")
@click.option("--gguf-file", metavar="NAME", help="Name of the .gguf file inside a MODEL that is a folder or hub id.")
@click.option(
    "--attn-implementation", metavar="NAME", help="Attention of transformers: sdpa, eager, flash_attention_2, ..."
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a MODEL from the hub.")
@click.pass_context
def main(context: click.Context, models: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Measure the perplexity of each MODEL and print a table.

    MODEL is a hub id, a local folder (dense, sparse checkpoint or export) or a .gguf file. The text is tokenised
    without special tokens and cut into windows that do not overlap; the figure is exp of the mean loss over all
    predicted tokens. A longer window gives a lower figure: compare only at the same window.
    """
    settings = _Settings(**options)
    if settings.dataset != WIKITEXT2:
        for name in _ONLY_WIKITEXT2:
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name.replace('_', '-')} belongs to --dataset {WIKITEXT2}, not to a file.")
    if json_file is not None:
        _check_json_file(Path(json_file))
    rows, label = _read_text(settings)
    device = find_device(settings.device)
    if len(models) > 1:  # of a single one, loading it says the same
        _check_models(models, settings)
    results: dict[str, tuple[str, PerplexityResult]] = {}
    try:
        for model in dict.fromkeys(models):
            results[model] = _evaluate(model, rows, device, settings)
    finally:  # an error in the last model does not lose the figures of the first
        if results:
            click.echo(_table(results, label))
    if json_file is not None:
        _write_json(Path(json_file), _record(results, label, device, settings))


def _check_json_file(path: Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: the folder {path.parent} does not exist. Make it first.")
    if path.is_dir():
        raise UserError(f"--json {path} is a folder. Name a file.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--json {path}: the folder {path.parent} cannot be written to.")


def _read_text(settings: _Settings) -> tuple[list[str], str]:
    """Rows to be joined by a blank line, and the name of the text."""
    if settings.dataset == WIKITEXT2:
        from ast_sparse.evaluation.perplexity import wikitext2_rows

        source = Path(settings.data_dir).expanduser() if settings.data_dir is not None else None
        label = source.name if source is not None and source.is_file() else f"{WIKITEXT2} {settings.split}"
        return wikitext2_rows(settings.split, source), label
    path = Path(settings.dataset).expanduser()
    if not path.is_file():
        raise UserError(f"--dataset {settings.dataset}: no such file, and not {WIKITEXT2}. Correct the name.")
    from ast_sparse.data.sources import load_documents

    source_ = load_documents([str(path.absolute())], None, settings.text_field, field="--dataset")[0]
    return list(source_.documents[source_.text_field]), path.name


def find_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` takes a GPU if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name} cannot be used: {reason:.200}. Name cpu, cuda or cuda:0.") from error
    return device


def _check_models(models: tuple[str, ...], settings: _Settings) -> None:
    """Find a wrong name or window before the first model is measured."""
    from ast_sparse.evaluation.perplexity import check_window, default_seq_len
    from ast_sparse.loading import load_model_config

    for model in models:
        config = load_model_config(
            model,
            revision=settings.revision,
            gguf_file=settings.gguf_file,
            trust_remote_code=settings.trust_remote_code,
        )
        try:
            check_window(config, settings.seq_len or default_seq_len(config))
        except UserError as error:
            raise UserError(f"{model}: {error}") from None


def _evaluate(name: str, rows: list[str], device: torch.device, settings: _Settings) -> tuple[str, PerplexityResult]:
    """Dtype and figures of one model."""
    import torch

    from ast_sparse.evaluation.perplexity import default_seq_len, evaluate_text
    from ast_sparse.loading import load_causal_lm, load_tokenizer

    trusted: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    place: dict[str, Any] = {"revision": settings.revision, "gguf_file": settings.gguf_file, **trusted}
    tokenizer = load_tokenizer(settings.tokenizer, **trusted) if settings.tokenizer else load_tokenizer(name, **place)
    dtype = settings.dtype or ("float32" if device.type == "cpu" else "auto")
    model: torch.nn.Module = load_causal_lm(
        name,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=settings.attn_implementation,
        **place,
    )
    model.to(device)
    seq_len = settings.seq_len or default_seq_len(model.config)
    try:
        result = evaluate_text(model, tokenizer, rows, seq_len, settings.limit)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return str(model.dtype).removeprefix("torch."), result


def _table(results: dict[str, tuple[str, PerplexityResult]], label: str) -> str:
    from ast_sparse.evaluation.report import format_table

    headers = ("model", "dataset", "dtype", "window", "windows", "predicted tokens", "perplexity")
    lines = []
    for model, (dtype, result) in results.items():
        all_windows = result.total_tokens // result.seq_len
        windows = f"{result.windows:,}" + (f" of {all_windows:,}" if result.windows < all_windows else "")
        lines.append((model, label, dtype, result.seq_len, windows, result.predicted_tokens, result.perplexity))
    return format_table(headers, lines)


def _record(
    results: dict[str, tuple[str, PerplexityResult]], label: str, device: torch.device, settings: _Settings
) -> dict[str, Any]:
    from dataclasses import asdict

    import torch
    import transformers

    import ast_sparse

    return {
        "results": [
            {"model": model, "dataset": label, "dtype": dtype, **_finite(asdict(result))}
            for model, (dtype, result) in results.items()
        ],
        "settings": {**asdict(settings), "device": str(device)},
        "versions": {
            "ast_sparse": ast_sparse.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN and no infinity: a model that diverged has null.
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _write_json(path: Path, record: dict[str, Any]) -> None:
    from ast_sparse.export.files import write_json

    try:
        write_json(path, record)
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror or error}.") from error


if __name__ == "__main__":
    main()
