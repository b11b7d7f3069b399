"""ast-prune: prune a dense causal LM to N:M in one shot, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ast_sparse.cli.calibration import calibration_text, sequence_options
from ast_sparse.cli.command import Command, settings_as_options
from ast_sparse.cli.options import check_effect, find_device
from ast_sparse.config import BasisConfig, CalibrationConfig, ModelConfig, SLoRBConfig, SparsityConfig
from ast_sparse.config.basis import check_basis
from ast_sparse.config.data import BOS_CHOICES
from ast_sparse.config.sparsity import METHOD_HELP
from ast_sparse.tables import layer_kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from ast_sparse.sparsity.model import SparsityReport
    from ast_sparse.sparsity.oneshot import OneShotMethod

_OPTIONS = {  # the option for each setting
    "sparsity.init": "--method",
    "sparsity.pattern": "--pattern",
    "sparsity.include": "--include",
    "sparsity.exclude": "--exclude",
    "calibration.data": "--calibration",
    "calibration.samples": "--samples",
    "calibration.seq_len": "--seq-len",
    "calibration.seed": "--seed",
    "calibration.damping": "--damping",
    "calibration.block_size": "--block-size",
    "calibration.keep_zeros": "--keep-zeros",
    "basis.rotation_steps": "--rotation-steps",
    "calibration.recovery_epochs": "--recovery-epochs",
    "calibration.recovery_learning_rate": "--recovery-learning-rate",
    "calibration.recovery_batch_size": "--recovery-batch-size",
    "slorb.k": "--slorb-k",
    "model.revision": "--revision",
    "model.gguf_file": "--gguf-file",
    "model.trust_remote_code": "--trust-remote-code",
}
_CALIBRATION = (
    "samples", "seq_len", "seed", "damping", "block_size", "keep_zeros", "recovery_epochs", "recovery_learning_rate",
    "recovery_batch_size",
)  # fmt: skip
_TEXT_OPTIONS = ("data", "text_field", "samples", "seq_len", "seed", "bos")
_RECORDED = ("include", "exclude", "revision", "gguf_file")  # options that no section of the record has


@click.command(cls=Command)
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@click.option(
    "--method", type=click.Choice(list(METHOD_HELP)), required=True,
    help=" ".join(f"{name}: {text}." for name, text in METHOD_HELP.items()),
)  # fmt: skip
@click.option(
    "--pattern", default="2:4", show_default=True, metavar="N:M",
    help="N of every M weights kept along the input dimension, or unstructured: half of every layer.",
)  # fmt: skip
@click.option(
    "--calibration", "data", multiple=True, metavar="FILE",
    help="Calibration text: a text, JSONL or parquet file; repeatable. Default: allenai/c4 from the hub.",
)  # fmt: skip
@sequence_options
@click.option(
    "--bos", type=click.Choice(BOS_CHOICES), default="auto", show_default=True,
    help="BOS in the calibration text. none: no BOS; document: before each document; block or window: before each "
    "sequence; auto: as the tokenizer does with a document.",
)  # fmt: skip
@click.option(
    "--damping", type=float, default=0.01, show_default=True,
    help="sparsegpt: share of the Hessian's mean diagonal that is added to the diagonal.",
)  # fmt: skip
@click.option(
    "--block-size", type=int, default=128, show_default=True,
    help="sparsegpt: number of columns pruned before the remaining columns are updated.",
)  # fmt: skip
@click.option(
    "--keep-zeros", is_flag=True,
    help="sparsegpt: weights that are already zero in a sparse MODEL stay zero; the other methods always keep them.",
)  # fmt: skip
@click.option(
    "--permute", is_flag=True,
    help="Reorder channels before pruning, so that no group has more strong inputs than it keeps; needs text.",
)  # fmt: skip
@click.option(
    "--rotation-steps", type=int, default=0, show_default=True, metavar="N",
    help="Learn a rotation of the channels in N steps before pruning, 60 for example; needs text. Tied embeddings are "
    "untied.",
)  # fmt: skip
@click.option(
    "--recovery-epochs", type=int, default=0, show_default=True,
    help="Passes over the text that train each pruned block towards the outputs of the dense one; needs text.",
)  # fmt: skip
@click.option(
    "--recovery-learning-rate", type=float, default=2e-4, show_default=True, help="Learning rate of that training."
)
@click.option(
    "--recovery-batch-size", type=int, default=4, show_default=True, help="Sequences in a batch of that training."
)
@click.option(
    "--slorb-k", type=int, metavar="K",
    help="Make SLoRB adapters of rank inputs / K beside the pruned layers, 16 for example: from the text that the "
    "method reads; with magnitude, from the mean of what it prunes.",
)  # fmt: skip
@click.option("--include", multiple=True, metavar="NAME", help="Prune only matching layers; * is a wildcard.")
@click.option("--exclude", multiple=True, metavar="NAME", help="Keep matching layers dense; * is a wildcard.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True,
    help="Dtype of the written weights; pruning is computed in float32.",
)  # fmt: skip
@click.option(
    "--device", default="auto", show_default=True,
    help="Where blocks are pruned, one at a time: cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the model in OUT.")
@click.option("--revision", help="Branch, tag or commit of MODEL on the hub.")
@click.option("--gguf-file", metavar="NAME", help="Name of the .gguf file inside a MODEL that is a folder or hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with MODEL.")
@click.pass_context
def main(context: click.Context, model: str, out: str, **options: Any) -> None:
    """Prune MODEL to N:M in one shot and write it to the folder OUT.

    MODEL is a hub id, a local folder or a .gguf file. Blocks are pruned one after the other, each calibrated on the
    outputs of the pruned blocks before it. OUT is an ordinary checkpoint with zeros, verified to be N:M. Measure it
    with ast-eval; compress it with ast-export. An error or an interruption leaves OUT as it was.
    """
    with settings_as_options(_OPTIONS):
        sparsity = SparsityConfig(
            init=options["method"], pattern=options["pattern"], include=options["include"], exclude=options["exclude"]
        )
        calibration = CalibrationConfig(
            data=options["data"] or None,
            **{key: options[key] for key in _CALIBRATION},
        )
        basis = BasisConfig(permute=options["permute"], rotation_steps=options["rotation_steps"])
        check_basis(basis, sparsity)
        source = ModelConfig(
            name_or_path=model, **{key: options[key] for key in ("revision", "gguf_file", "trust_remote_code")}
        )
        _prune(context, source, Path(out).expanduser(), sparsity, calibration, basis, options)


def _prune(
    context: click.Context,
    source: ModelConfig,
    out: Path,
    sparsity: SparsityConfig,
    calibration: CalibrationConfig,
    basis: BasisConfig,
    options: dict[str, Any],
) -> None:
    from ast_sparse.export.export import DTYPES, export_model
    from ast_sparse.sparsity.model import sparsify_model
    from ast_sparse.sparsity.oneshot import METHODS
    from ast_sparse.storage.load import load_causal_lm
    from ast_sparse.storage.locate import load_tokenizer
    from ast_sparse.storage.meta import meta_student
    from ast_sparse.storage.origin import hub_commit
    from ast_sparse.storage.save import check_out_dir
    from ast_sparse.storage.space import check_space

    chosen, k = METHODS[sparsity.init], options["slorb_k"]
    _check_usage(context, chosen, basis)
    device = find_device(options["device"])
    check_out_dir(out.resolve(), _home(source), options["overwrite"])
    meta = meta_student(source)
    slorb = None if k is None else SLoRBConfig(k=k, init="svd" if chosen.needs_text else "mean")
    # checks settings, shapes and names before weights are loaded
    sparsify_model(meta, sparsity, slorb, calibration_config=calibration)
    written_values = sum(each.numel() for each in meta.parameters() if each.is_floating_point())  # with SLoRB
    check_space(out, written_values * DTYPES[options["dtype"]].itemsize)
    place: dict[str, Any] = {key: getattr(source, key) for key in ("revision", "gguf_file", "trust_remote_code")}
    tokenizer = load_tokenizer(source.name_or_path, **place)
    samples = None
    if chosen.needs_text or basis.is_on:
        samples = calibration_text(calibration, tokenizer, meta.config, options["text_field"], options["bos"])
    model = load_causal_lm(source.name_or_path, **place)
    if basis.is_on and samples is not None:
        _change_basis(model, basis, sparsity, calibration, samples, device)
    report = sparsify_model(
        model, sparsity, slorb, calibration_config=calibration, samples=samples, device=device, progress=True
    )
    text = "\n".join([*report.lines(), *_errors(report, chosen.needs_text)])
    for setting in ("sparsity.include", "sparsity.exclude"):  # why layers stay dense
        text = text.replace(f"in {setting}\n", f"in {_OPTIONS[setting]}\n")
    click.echo(text)
    method = _record(sparsity, calibration, basis, slorb, samples, options)
    written = export_model(
        model, out, "dense", dtype=options["dtype"], overwrite=options["overwrite"], tokenizer=tokenizer, progress=True,
        record={"base_model": source.name_or_path, "base_commit": hub_commit(model.config), "one_shot": method},
    )  # fmt: skip
    click.echo(f"Wrote {written.out_dir}. Measure it with ast-eval; compress it with ast-export.")


def _check_usage(context: click.Context, chosen: OneShotMethod, basis: BasisConfig) -> None:
    """Refuse options that would have no effect."""
    from ast_sparse.sparsity.oneshot import METHODS

    of_text = " or ".join(f"--method {name}" for name, method in METHODS.items() if method.needs_text)
    of_hessian = " or ".join(f"--method {name}" for name, method in METHODS.items() if method.needs_hessian)
    recovers = context.params["recovery_epochs"] > 0
    needs: dict[str, tuple[bool, tuple[str, ...]]] = {
        f"{of_text} or --permute": (chosen.needs_text or basis.is_on, _TEXT_OPTIONS),
        f"{of_hessian} or --rotation-steps": (chosen.needs_hessian or basis.rotation_steps > 0, ("damping",)),
        of_hessian: (chosen.needs_hessian, ("block_size",)),
        "--recovery-epochs": (recovers, ("recovery_learning_rate", "recovery_batch_size")),
    }
    check_effect(context, needs)


def _home(source: ModelConfig) -> Path | None:
    """The folder with the weights of a model; None on the hub."""
    path = Path(source.name_or_path).expanduser()
    if source.gguf_file is not None and path.is_dir():
        path /= source.gguf_file
    return path.resolve() if path.is_dir() else path.parent.resolve() if path.is_file() else None


def _record(
    sparsity: SparsityConfig,
    calibration: CalibrationConfig,
    basis: BasisConfig,
    slorb: SLoRBConfig | None,
    samples: Tensor | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """`one_shot` of sparsity_config.json: what is needed to do the same again."""
    made: dict[str, Any] = {"method": sparsity.init, **{key: options[key] for key in _RECORDED if options[key]}}
    if basis.is_on:
        made["basis"] = basis.to_dict()
    if slorb is not None:
        made["slorb"] = {"k": slorb.k, "init": slorb.init}
    if samples is not None:
        read = {"seq_len": samples.shape[1], "text_field": options["text_field"], "bos": options["bos"]}
        made["calibration"] = {**calibration.to_dict(), **read}
    return made


def _change_basis(
    model: PreTrainedModel,
    basis: BasisConfig,
    sparsity: SparsityConfig,
    calibration: CalibrationConfig,
    samples: Tensor,
    device: torch.device,
) -> None:
    from ast_sparse.basis.change import change_basis
    from ast_sparse.sparsity.masks import Pattern

    options: Any = {"seed": calibration.seed, "damping": calibration.damping, "device": device, "progress": True}
    report = change_basis(model, basis, Pattern.of(sparsity), samples, **options)
    click.echo("\n".join(report.lines()))


def _errors(report: SparsityReport, needs_text: bool) -> list[str]:
    """Mean relative error of each kind of layer."""
    kinds: dict[str, list[float]] = {}
    for name, error in report.errors.items():
        kinds.setdefault(layer_kind(name), []).append(error)
    of = "the outputs on the calibration text" if needs_text else "the weights"
    lines = [f"relative squared error of {of}, mean over the blocks:"]
    lines += [f"  {kind}  {sum(errors) / len(errors):.4f}" for kind, errors in kinds.items()]
    if report.recovered:
        lines.append("relative squared error of a block's outputs, before and after its recovery:")
        lines += [f"  {name}  {before:.4f} -> {after:.4f}" for name, (before, after) in report.recovered.items()]
    return lines


if __name__ == "__main__":
    main()
