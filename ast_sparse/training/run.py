"""One run of `ast-train`: check, prepare, measure the dense and the one-shot model, train, save, measure again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from ast_sparse.config import ModelConfig, RunConfig
from ast_sparse.data.sources import check_sources
from ast_sparse.data.text import build_datasets
from ast_sparse.errors import UserError
from ast_sparse.evaluation.perplexity import (
    PerplexityResult,
    default_seq_len,
    evaluate_blocks,
    evaluate_text,
    wikitext2_rows,
)
from ast_sparse.evaluation.report import format_table
from ast_sparse.loading import load_causal_lm, load_tokenizer
from ast_sparse.sparsity.masks import check_nm
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.training.arguments import build_arguments
from ast_sparse.training.callbacks import MASK_HISTORY
from ast_sparse.training.checkpoints import checkpoint_folders, last_checkpoint, resolve_checkpoint, write_json
from ast_sparse.training.plan import make_plan
from ast_sparse.training.trainer import SparseTrainer

logger = logging.get_logger(__name__)

RESULTS = "results.json"
RESOLVED_CONFIG = "config.yaml"

Rows = dict[str, dict[str, dict[str, Any]]]  # stage -> data set -> figures


def run_training(
    config: RunConfig,
    output_dir: str | None = None,
    resume: str | bool | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    echo: Callable[[str], None] = print,
) -> Path | None:
    """Do what a configuration says; see the module's first line.

    Args:
        output_dir: beats `training.output_dir`.
        resume: True for the last complete checkpoint of the output folder, or a checkpoint folder.
        overwrite: replace a run that the output folder holds.
        dry_run: print the plan and stop; nothing is loaded or written.

    Returns:
        The output folder, or None after a dry run.

    Raises:
        UserError: one line; nothing has been written unless training had begun.
    """
    output = _output_dir(config, output_dir)
    args = build_arguments(config.training, str(output))
    checkpoint = _checkpoint_to_resume(output, resume)
    if checkpoint is None and not resume and not overwrite and not dry_run:
        _refuse_used(output)
    check_sources(config.data)
    measured = _Measured(config, args)
    plan = make_plan(config, args)
    if args.should_log:
        echo("\n".join(plan.lines()))
    if dry_run:
        return None

    trainer, rows = _prepare(config, args, measured, checkpoint, overwrite, echo)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _check_final(trainer.model)
    trainer.save_model()
    trainer.save_state()
    pattern = config.sparsity.pattern
    rows[f"retrained {pattern}"] = measured(trainer.model, trainer.processing_class, trainer.eval_dataset)
    if args.should_save:
        write_json(output / RESULTS, rows)
        echo(results_table(rows))
        echo(f"Saved {pattern} model to {output}")
    return output


def _prepare(
    config: RunConfig,
    args: TrainingArguments,
    measured: "_Measured",
    checkpoint: Path | None,
    overwrite: bool,
    echo: Callable[[str], None],
) -> tuple[SparseTrainer, Rows]:
    """Data, model and trainer; the figures of the dense and the one-shot model."""
    model_config = config.model
    tokenizer = load_tokenizer(
        model_config.name_or_path,
        revision=model_config.revision,
        gguf_file=model_config.gguf_file,
        trust_remote_code=model_config.trust_remote_code,
    )
    with args.main_process_first(desc="tokenising"):
        train, held_out, data_report = build_datasets(config.data, tokenizer)
    if args.should_log:
        echo("\n".join(data_report.lines()))
    model = _load_student(model_config)
    output = Path(str(args.output_dir))
    pattern = config.sparsity.pattern
    rows = _read_rows(output / RESULTS) if checkpoint is not None else {}
    if "dense" not in rows:
        rows["dense"] = measured(model.to(args.device), tokenizer, held_out)
    trainer = SparseTrainer(
        model,
        args,
        sparsity_config=config.sparsity,
        distillation_config=config.distillation,
        slorb_config=config.slorb if config.slorb is not None and config.slorb.enabled else None,
        teacher_model=model_config.teacher,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    if args.should_save:
        if overwrite:
            _remove_run(output)
        _write_config(config, output)
    if f"one-shot {pattern}" not in rows:
        rows[f"one-shot {pattern}"] = measured(trainer.model, tokenizer, held_out)
    if args.should_save:
        write_json(output / RESULTS, rows)
    return trainer, rows


def _output_dir(config: RunConfig, output_dir: str | None) -> Path:
    folder = output_dir or config.training.get("output_dir")
    if not folder:
        raise UserError("training.output_dir is missing. Set it, or give --output-dir.")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"Output folder {str(path)!r} is a file. Give another --output-dir.")
    return path


def _checkpoint_to_resume(output: Path, resume: str | bool | None) -> Path | None:
    """The checkpoint to continue from; None to begin, also where a run was stopped before its first checkpoint."""
    if not resume:
        return None
    if resume is True and (output / RESOLVED_CONFIG).exists() and last_checkpoint(output) is None:
        logger.warning(f"{output} holds a run without a complete checkpoint yet: it starts from the beginning.")
        return None
    return resolve_checkpoint(output, resume)


def _refuse_used(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        what = "a run" if (output / RESOLVED_CONFIG).exists() or checkpoint_folders(output) else "files"
        raise UserError(
            f"Output folder {str(output)!r} holds {what} already. Continue it with --resume, replace it with "
            "--overwrite, or give another --output-dir."
        )


def _remove_run(output: Path) -> None:
    """Remove what an earlier run left that this one might not overwrite; other files stay."""
    for folder in checkpoint_folders(output):
        shutil.rmtree(folder)
    for name in (MASK_HISTORY, RESULTS, "trainer_state.json"):
        (output / name).unlink(missing_ok=True)
    for weights in output.glob("model*.safetensors*"):
        weights.unlink()
    shutil.rmtree(output / "slorb", ignore_errors=True)


def _write_config(config: RunConfig, output: Path) -> None:
    """The resolved configuration: enough to repeat the run."""
    output.mkdir(parents=True, exist_ok=True)
    tree = config.to_dict()
    tree["training"] = {**config.training, "output_dir": str(output)}
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    (output / RESOLVED_CONFIG).write_text(text, encoding="utf-8")


def _load_student(model: ModelConfig) -> PreTrainedModel:
    return load_causal_lm(
        model.name_or_path,
        revision=model.revision,
        gguf_file=model.gguf_file,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        config_overrides=model.config_overrides,
    )


def _check_final(model: nn.Module) -> None:
    """Every trained layer is exactly N:M, by the checker of the export."""
    for name, layer in sparse_layers(model).items():
        if not check_nm(layer.weight, layer.n, layer.m, dim=layer.group_dim):
            raise RuntimeError(f"`{name}` is not {layer.n}:{layer.m} after training. This is a fault of ast_sparse.")


def _read_rows(path: Path) -> Rows:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {stage: rows[stage] for stage in rows if not stage.startswith("retrained")}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class _Measured:
    """Perplexities of `evaluation.datasets`; sources are checked before a model is loaded."""

    def __init__(self, config: RunConfig, args: TrainingArguments) -> None:
        self.config = config
        self.show = bool(args.should_log) and not args.disable_tqdm
        self.texts: dict[str, list[str]] = {}
        for name in config.evaluation.datasets:
            if name == "wikitext2":
                self.texts[name] = wikitext2_rows(data_dir=config.evaluation.data_dir)
            elif name != "heldout":
                self.texts[name] = [self._read(name)]
        if "heldout" in config.evaluation.datasets and config.data.eval is None and config.data.eval_share == 0:
            raise UserError(
                "evaluation.datasets has 'heldout' and data.eval_share is 0. Set data.eval or data.eval_share, "
                "or remove it."
            )

    def _read(self, name: str) -> str:
        path = Path(self.config.data.root or ".") / name
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(
                f"evaluation.datasets: {str(path)!r} cannot be read ({reason}). Name 'heldout', 'wikitext2' or a text "
                "file; relative paths start from data.root."
            ) from None

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Any
    ) -> dict[str, dict[str, Any]]:
        settings = self.config.evaluation
        results: dict[str, PerplexityResult] = {}
        for name in settings.datasets:
            if name == "heldout":
                results[name] = evaluate_blocks(model, held_out, settings.windows, progress=self.show)
            else:
                seq_len = settings.seq_len or default_seq_len(model.config)
                results[name] = evaluate_text(
                    model, tokenizer, self.texts[name], seq_len, settings.windows, progress=self.show
                )
        return {name: asdict(result) for name, result in results.items()}


def results_table(rows: Rows) -> str:
    """Perplexity by stage and data set, the window length beside every data set."""
    datasets = list(dict.fromkeys(name for stage in rows.values() for name in stage))
    if not datasets:
        return "No perplexity was asked for (evaluation.datasets is empty)."
    first = next(iter(rows.values()))
    headers = ["model"] + [f"{name} ({first[name]['windows']} x {first[name]['seq_len']})" for name in datasets]
    lines = [[stage, *(f"{row[name]['perplexity']:.2f}" for name in datasets)] for stage, row in rows.items()]
    return "Perplexity (windows x tokens)\n" + format_table(headers, lines)
