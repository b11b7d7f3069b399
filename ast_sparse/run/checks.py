"""Checks of ast-train before a run begins, and of the model at its end."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ast_sparse.config import RunConfig, SLoRBConfig
from ast_sparse.data.blocks.domains import DomainBlocks
from ast_sparse.data.blocks.stored import TokenBlocks
from ast_sparse.data.blocks.streaming import StreamedBlocks
from ast_sparse.data.build import Blocks
from ast_sparse.data.sources.entries import MissingTextError, check_entries, check_sources
from ast_sparse.distributed.pieces import whole
from ast_sparse.distributed.ranks import errors_shared, gather, rank
from ast_sparse.errors import UserError, one_line, shown
from ast_sparse.planning.plan import Hardware, Plan, make_plan
from ast_sparse.report.page import check_report
from ast_sparse.run.disk import Disk
from ast_sparse.run.memory_choices import decide_by_memory, needs_memory_plan
from ast_sparse.run.output import (
    check_finished,
    checkpoint_to_resume,
    output_folder,
    refuse_used,
    replaced_bytes,
    run_state,
)
from ast_sparse.run.precision import decide_bf16, is_undecided, without_auto
from ast_sparse.run.same_on_all import check_same_settings
from ast_sparse.run.signals import PreemptionSignals
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.sparsity.recovery import check_recovery
from ast_sparse.sparsity.slorb import check_slorb
from ast_sparse.storage.files import is_same
from ast_sparse.storage.locate import load_model_config
from ast_sparse.storage.run_folder import REPORT
from ast_sparse.training.checks.arguments import build_arguments, check_shared_batches
from ast_sparse.training.checks.inputs import check_optimizer_settings, check_taught
from ast_sparse.training.checks.mixture import check_evaluations
from ast_sparse.training.checks.semi_structured import check_semi_structured
from ast_sparse.training.fsdp import check_sharding
from ast_sparse.training.resume.checkpoints import check_same_model, check_same_run
from ast_sparse.training.resume.same_run import check_settings

IF_STARTED = "if started"  # a value of `resume`


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A run that has passed the checks: what its phases share.

    Attributes:
        checkpoint: the checkpoint to continue from, or None.
        overwrite: replace a run in the output folder.
        changed: lines on the allowed differences from the run of the checkpoint.
    """

    config: RunConfig
    args: TrainingArguments
    output: Path
    checkpoint: Path | None
    overwrite: bool
    plan: Plan
    changed: list[str]
    echo: Callable[[str], None]
    signals: PreemptionSignals


def checked_run(
    config: RunConfig,
    output_dir: str | None,
    resume: str | bool | None,
    overwrite: bool,
    dry_run: bool,
    hardware: Hardware,
    echo: Callable[[str], None],
    signals: PreemptionSignals,
    saves_model: bool = True,
) -> CheckedRun | None:
    """Do all checks that need no weights and no tokenizer, and return the run. Arguments as in `run_training`.

    Args:
        saves_model: False: a run that is not kept, in a folder inside the output folder that the user has named.

    Returns:
        The run; None if it is finished, and was to be resumed if it had started.

    Raises:
        UserError: a setting, the text, the output folder or the checkpoint does not fit.
    """
    with errors_shared():
        check_same_settings(config)
        output = output_folder(config, output_dir)
    forced = {"use_cpu": True} if dry_run else {}  # a plan needs no accelerator, which bf16 would ask for
    args = build_arguments({**without_auto(config.training), **forced}, str(output), not is_undecided(config.training))
    with errors_shared():
        if not dry_run:
            check_sharding(args)
        if resume == IF_STARTED:
            state = gather(run_state(output))[0]  # on a network drive, other processes may see older contents
            if state == "finished":
                check_finished(output, config)
                if args.should_log:
                    echo(f"{output} has the finished run: nothing is left to do. --overwrite would start it again.")
                return None
            resume = state == "started"
        checkpoint = checkpoint_to_resume(output, resume)
        is_continued = resume is True or (checkpoint is not None and is_same(checkpoint.parent, output))
        if not is_continued and not overwrite and not dry_run:
            refuse_used(output)
        config, precision = decide_bf16(config, args.device, checkpoint, dry_run)
    if precision is not None:
        args = build_arguments({**config.training, **forced}, str(output))
    with errors_shared():
        note, devices = _check_settings(config, args, output, dry_run), hardware.world_size or args.world_size
        check_shared_batches(args, devices)
        check_optimizer_settings(config.optimizer, args, processes=devices, sparsity=config.sparsity)
        check_semi_structured(config.sparsity, config.optimizer, args, bool(config.training.get("use_cpu")))
        plan = make_plan(config, args, devices if dry_run else None, needs_memory_plan(config, args))
        config, chosen = decide_by_memory(config, args, plan)
        notes = (*(each for each in (precision, note) if each is not None), *chosen)
        starts = checkpoint is None and not dry_run and rank() == 0
        room = _room(Disk.of(config, args, plan, saves_model), output, overwrite, starts)
        plan = replace(plan, notes=(*plan.notes, *notes, *room))
        changed = [] if checkpoint is None else _check_checkpoint(checkpoint, config, args, plan, devices)
    return CheckedRun(
        config=config, args=args, output=output, checkpoint=checkpoint, overwrite=overwrite, plan=plan, changed=changed,
        echo=echo, signals=signals,
    )  # fmt: skip


def _room(disk: Disk, output: Path, overwrite: bool, starts: bool) -> tuple[str, ...]:
    """The line on the disk that a run needs, if it needs any; UserError if it starts now and there is no room."""
    if not disk.needed:
        return ()
    if not starts:
        return (disk.line(),)
    named = output if disk.saves_model else output.parent
    return (disk.check(named, replaced_bytes(output, overwrite)),)


def _check_settings(config: RunConfig, args: TrainingArguments, output: Path, dry_run: bool) -> str | None:
    """A note on why the text cannot be read, if it cannot and the run is a dry one.

    Raises:
        UserError: settings do not fit together, or text is missing.
    """
    note = None
    if config.evaluation.report:
        check_report(output / REPORT, "evaluation.report")
    check_recovery(config.sparsity.init, config.calibration)
    check_slorb(config.sparsity.init, config.slorb)
    try:
        check_sources(config.data)
        check_entries(config.calibration.data or (), config.data.root, "calibration.data")
    except MissingTextError as error:
        if not dry_run:
            raise
        note = f"text: not looked at, a plan needs none ({one_line(error, end='open')})"
    check_evaluations(config.data.mixture, args)
    check_streaming(config, args)
    check_held_out(config, args)
    check_best(config, args)
    return note


def _check_checkpoint(
    checkpoint: Path, config: RunConfig, args: TrainingArguments, plan: Plan, devices: int
) -> list[str]:
    """Lines on allowed differences; raise UserError if the checkpoint belongs to another run."""
    lines = check_same_run(checkpoint, config.sparsity, slorb_of(config), plan.sparsity.pruned)
    check_same_model(checkpoint, plan.sparsity.pruned)
    return lines + check_settings(checkpoint, config, args, slorb_of(config), devices)


def slorb_of(config: RunConfig) -> SLoRBConfig | None:
    """The settings of SLoRB; None if it is off."""
    return config.slorb if config.slorb is not None and config.slorb.enabled else None


def check_held_out(config: RunConfig, args: TrainingArguments) -> None:
    """Raise UserError if held-out text is needed and there is none."""
    if config.data.entries("eval") or config.data.eval_share > 0:
        return
    if "heldout" in config.evaluation.datasets:
        raise UserError(
            "evaluation.datasets has 'heldout' and data.eval_share is 0. Set data.eval or data.eval_share, or "
            "remove 'heldout'."
        )
    for key in ("eval_strategy", "eval_on_start"):
        value = getattr(args, key)
        if getattr(value, "value", value) not in ("no", False):
            shown = repr(getattr(value, "value", value))
            raise UserError(
                f"training.{key}={shown} needs held-out text, and data.eval_share is 0. Set data.eval or "
                f"data.eval_share, or remove {key}."
            )


def check_best(config: RunConfig, args: TrainingArguments) -> None:
    """Raise UserError if the best checkpoint would be chosen on a test set, or on text whose perplexity is reported."""
    if args.load_best_model_at_end:
        by = "training.load_best_model_at_end=True"
    elif args.save_strategy == SaveStrategy.BEST:
        by = "training.save_strategy='best'"
    else:
        return
    check_choosing(config, by)


def check_choosing(config: RunConfig, by: str, what: str = "a checkpoint") -> None:
    """Raise UserError if held-out text is a test set, or text whose perplexity is reported.

    Args:
        by: the setting or option that chooses by it.
        what: what it chooses.
    """
    for where, entries in config.data.entries("eval").items():
        for entry in entries:
            if isinstance(entry, dict) and "test" in re.split(r"\W+", str(entry.get("split"))):
                raise UserError(
                    f"{where}: {shown(entry)} is a test set, and {by} would choose {what} by it. Name another "
                    "split, or remove it, to hold out a share of the training text."
                )
            if entry in config.evaluation.datasets:
                raise UserError(
                    f"{where}: {shown(entry)} is also in evaluation.datasets, and {by} would choose {what} by text "
                    "that is reported. Name other text in one of them."
                )


def check_streaming(config: RunConfig, args: TrainingArguments) -> None:
    """Raise UserError if training arguments do not allow a stream."""
    if not config.data.streaming:
        return
    if args.max_steps <= 0:
        raise UserError("data.streaming=true: the length of the text is unknown. Set training.max_steps.")
    if args.dataloader_num_workers > 1:
        raise UserError(
            f"training.dataloader_num_workers={args.dataloader_num_workers}: each worker would read the same stream. "
            "Set it to 0 or 1, or make shards with ast-data prepare."
        )


def check_token_ids(
    train: Blocks,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    teacher: PreTrainedModel | str | None,
    trust_remote_code: bool,
) -> None:
    """Raise UserError if a token of the text has no embedding; unused tokens of the tokenizer need none.

    A stream raises it when it comes to the token. Every process must call this.
    """
    with errors_shared():
        rows = model.config.get_text_config().vocab_size
        taught_by = model.config
        if isinstance(teacher, str):
            taught_by = load_model_config(teacher, trust_remote_code=trust_remote_code)
        if len(tokenizer) <= min(rows, taught_by.get_text_config().vocab_size):
            return
        if isinstance(train, StreamedBlocks):
            train.embeddings = rows
            if rank() == 0:  # which alone reads text; most texts that do not fit have such a token at once
                next(iter(train))
            return
        largest = max(map(_largest_token, train.parts.values() if isinstance(train, DomainBlocks) else [train]))
        if largest >= rows:
            raise UserError(
                f"The tokenizer of {str(tokenizer.name_or_path)!r} makes the token {largest}, but the model has only "
                f"{rows} embeddings. Put the model's own tokenizer into its folder."
            )
        check_taught(torch.tensor(largest), model.config, taught_by)


def _largest_token(blocks: Any) -> int:
    if isinstance(blocks, TokenBlocks):
        return blocks.largest_token
    return max(pc.max(pc.list_flatten(chunk)).as_py() for chunk in blocks.data.column("input_ids").chunks)


def check_batches(args: TrainingArguments, blocks: int) -> None:
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and blocks < batch:
        raise UserError(
            f"training.dataloader_drop_last=True leaves nothing to train on: the text has {blocks:,} blocks, fewer "
            f"than a batch of {batch:,}. Lower per_device_train_batch_size, or remove it."
        )


def check_final(model: nn.Module) -> None:
    """Check that every trained layer is exactly N:M, as the export does; sharded layers are gathered for it."""
    for name, layer in sparse_layers(model).items():
        if not layer.pattern.holds(whole(layer.weight), layer.group_dim):
            raise RuntimeError(f"`{name}` is not {layer.pattern} after training. This is a bug in ast_sparse.")
