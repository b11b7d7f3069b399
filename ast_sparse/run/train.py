"""One run of `ast-train`: check, prepare, measure the dense and the one-shot model, train, save, measure again."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from ast_sparse.config import ModelConfig, RunConfig, SLoRBConfig
from ast_sparse.data.blocks.collator import document_borders
from ast_sparse.data.blocks.counted import with_counted_tokens
from ast_sparse.data.blocks.streaming import StreamedBlocks
from ast_sparse.data.build import Blocks, build_datasets
from ast_sparse.data.calibration import calibration_blocks
from ast_sparse.data.sources.entries import check_entries, check_sources
from ast_sparse.distributed.ranks import errors_shared, wait_for_all
from ast_sparse.errors import UserError
from ast_sparse.export.readback import check_saved
from ast_sparse.planning.budget import Budget
from ast_sparse.planning.memory import Setup, Sharding
from ast_sparse.planning.plan import Hardware, Plan, make_plan
from ast_sparse.progress import library_bars
from ast_sparse.report.page import check_report, run_report, write_report
from ast_sparse.run.checks import (
    check_batches,
    check_best,
    check_final,
    check_held_out,
    check_streaming,
    check_token_ids,
)
from ast_sparse.run.output import (
    checkpoint_to_resume,
    clear_for_run,
    output_folder,
    read_rows,
    read_samples,
    refuse_used,
    write_results,
)
from ast_sparse.run.preemption import PreemptionCallback
from ast_sparse.run.signals import PreemptionSignals
from ast_sparse.run.stages import Measured, PerplexityCallback, check_finite, results_table
from ast_sparse.storage.load import load_causal_lm, random_causal_lm
from ast_sparse.storage.locate import load_tokenizer
from ast_sparse.storage.meta import has_config_alone
from ast_sparse.storage.origin import check_saving
from ast_sparse.storage.run_folder import REPORT
from ast_sparse.storage.stage_results import Stages
from ast_sparse.training.checks.arguments import build_arguments
from ast_sparse.training.checks.mixture import check_evaluations
from ast_sparse.training.fsdp import check_sharding, sharding_plugin
from ast_sparse.training.resume.checkpoints import check_same_model, check_same_run, write_errors
from ast_sparse.training.resume.same_run import check_settings, run_settings
from ast_sparse.training.trainer import SparseTrainer

logger = logging.get_logger(__name__)


def run_training(
    config: RunConfig,
    output_dir: str | None = None,
    resume: str | bool | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    echo: Callable[[str], None] = print,
    signals: PreemptionSignals | None = None,
    hardware: Hardware | None = None,
) -> Path | None:
    """Do what a configuration says; see the module's first line.

    Args:
        output_dir: beats `training.output_dir`.
        resume: True for the last complete checkpoint of the output folder, or a checkpoint folder.
        overwrite: replace a run that the output folder holds.
        dry_run: print the plan and stop; no weights are loaded, nothing is written.
        signals: those that make the run save and leave.
        hardware: what a dry run plans for.

    Returns:
        The output folder, or None after a dry run.

    Raises:
        UserError: one line; nothing has been written unless training had begun. After the plan of a dry run: a device
            has too little memory for it.
        Preempted: a signal came, and the run can be resumed.
    """
    signals = signals or PreemptionSignals()
    output = output_folder(config, output_dir)
    # a plan needs no accelerator, and bf16 without one would be refused
    values = {**config.training, "use_cpu": True} if dry_run else config.training
    args = build_arguments(values, str(output))
    if not dry_run:
        check_sharding(args)
    with errors_shared():
        checkpoint = checkpoint_to_resume(output, resume)
    is_continued = resume is True or (checkpoint is not None and checkpoint.parent.resolve() == output.resolve())
    if not is_continued and not overwrite and not dry_run:
        refuse_used(output)
    if config.evaluation.report:
        check_report(output / REPORT, "evaluation.report")
    check_sources(config.data)
    check_entries(config.calibration.data or (), config.data.root, "calibration.data")
    check_evaluations(config.data.mixture, args)
    check_streaming(config, args)
    check_held_out(config, args)
    check_best(config, args)
    hardware = hardware or Hardware()
    devices = hardware.world_size or args.world_size
    plan = make_plan(config, args, devices if dry_run else None)
    changed = []
    if checkpoint is not None:
        with errors_shared():
            check_same_run(checkpoint, config.sparsity, _slorb(config), plan.sparsity.pruned)
            check_same_model(checkpoint, plan.sparsity.pruned)
            changed = check_settings(checkpoint, config, args, _slorb(config), devices)
    if args.should_log:
        echo("\n".join(plan.lines()))
    if dry_run:
        if args.should_log and changed:
            echo("\n".join(changed))
        if not has_config_alone(config.model):
            _tokenizer(config.model, plan)
        if args.should_log:
            _show_budget(plan, config, args, hardware, echo)
        return None

    measured = Measured(config, args)
    tokenizer = _tokenizer(config.model, plan)
    measured.check_lengths(tokenizer, plan.model_config)
    trainer, rows = _prepare(config, args, tokenizer, measured, checkpoint, overwrite, echo, signals)
    if config.evaluation.steps is not None:
        measure = partial(measured.during_training, tokenizer=tokenizer, held_out=trainer.eval_dataset)
        trainer.add_callback(PerplexityCallback(config.evaluation.steps, measure, trainer.log))
    trainer.add_callback(PreemptionCallback(signals))
    with write_errors(output):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        signals.finish()
        # without the autocast of training: all stages are measured in the float32 that is saved
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        check_final(trainer.student)
        trainer.save_model()
        trainer.save_state()
    pattern = config.sparsity.pattern
    stage = f"retrained {pattern}"
    student = trainer.whole_student()
    if student is not None and args.should_save:
        check_saved(student, output, config.model.trust_remote_code)
    if student is not None and measured.is_asked:  # of a sharded run, on one process while the others wait
        rows[stage] = measured(stage, student, tokenizer, trainer.eval_dataset)
    wait_for_all()
    if args.should_save:
        write_results(output, rows, measured)
        echo(results_table(rows))
        echo(f"Saved {pattern} model to {output}")
        if config.evaluation.report:
            echo(f"Wrote {write_report(output / REPORT, run_report(output))}")
    check_finite(rows)
    return output


def _tokenizer(model: ModelConfig, plan: Plan) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, once it has been saved into a temporary folder."""
    tokenizer = load_tokenizer(
        model.name_or_path,
        revision=model.revision,
        gguf_file=model.gguf_file,
        trust_remote_code=model.trust_remote_code,
    )
    check_saving(model.name_or_path, plan.model_config, tokenizer=tokenizer)
    return tokenizer


def _show_budget(
    plan: Plan, config: RunConfig, args: TrainingArguments, hardware: Hardware, echo: Callable[[str], None]
) -> None:
    """What the plan costs; UserError where a device has too little memory for it."""
    devices = hardware.world_size or args.world_size
    sharding: Sharding = "fsdp2" if sharding_plugin(args) is not None else "ddp" if devices > 1 else "none"
    evaluation = config.evaluation
    measured_by = ["evaluation.datasets=[]"] if evaluation.datasets else []
    measured_by += ["evaluation.report=false"] if evaluation.report else []
    on_cpu = bool(config.training.get("use_cpu"))
    setup = Setup.of(args, config.data.block_size, devices, sharding, tuple(measured_by), on_cpu)
    budget = Budget(plan, setup, hardware)
    echo("\n".join(budget.lines()))
    budget.check()


def _prepare(
    config: RunConfig,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    measured: Measured,
    checkpoint: Path | None,
    overwrite: bool,
    echo: Callable[[str], None],
    signals: PreemptionSignals,
) -> tuple[SparseTrainer, Stages]:
    """Data, model and trainer; the results of the dense and the one-shot model."""
    with args.main_process_first(desc="tokenising"), library_bars(not args.disable_tqdm):
        try:
            train, held_out, data_report = build_datasets(config.data, tokenizer)
        except OSError as error:  # of the cache: sources that cannot be read are named where they are read
            raise UserError(
                f"The tokenised text cannot be cached: {' '.join(str(error).split())}. Let the environment variable "
                "HF_DATASETS_CACHE name a folder that can be written to and has room."
            ) from error
    if args.should_log:
        echo("\n".join(data_report.lines()))
    every_block, borders = train, document_borders(tokenizer, config.data.packing, config.data.bos)
    train = with_counted_tokens(train, "data.train", borders, says=False)
    held_out = with_counted_tokens(held_out, "The held-out text", borders, says=False)
    if not isinstance(train, StreamedBlocks):
        check_batches(args, len(train))
    with library_bars(not args.disable_tqdm):
        model = _random_student(config.model, args.seed) if config.model.random_weights else _load_dense(config.model)
        teacher = _teacher(config)
    check_token_ids(train, tokenizer, model, teacher, config.model.trust_remote_code)
    output = Path(str(args.output_dir))
    pattern = config.sparsity.pattern
    rows = read_rows(output, config) if checkpoint is not None else {}
    measured.samples = read_samples(output, rows) if config.evaluation.report else {}
    stage = "random" if config.model.random_weights else "dense"
    if stage not in rows:
        rows[stage] = measured(stage, model, tokenizer, held_out)
        check_finite(rows)
    try:
        trainer = SparseTrainer(
            model,
            args,
            sparsity_config=config.sparsity,
            distillation_config=config.distillation,
            slorb_config=_slorb(config),
            calibration_config=config.calibration,
            watch_config=config.watch,
            calibration_dataset=_calibration(config, args, tokenizer, checkpoint, every_block),
            teacher_model=teacher,
            mixture_config=config.data.mixture if config.data.domains else None,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            packing=config.data.packing,
            bos=config.data.bos,
            trust_remote_code=config.model.trust_remote_code,
        )
    except OSError as error:  # of the output folder, which Trainer makes, or of the hub
        raise UserError(f"training: {' '.join(str(error).split())}. Correct training.output_dir.") from error
    trainer.run_record.sections = run_settings(config)
    if checkpoint is not None:
        trainer.check_resume(checkpoint)
    with signals.held():
        if args.should_save:
            clear_for_run(config, output, checkpoint, overwrite)
        signals.mend = "--resume starts it again"  # also from the beginning, where there is no checkpoint
    stage = f"one-shot {pattern}"
    is_one_shot = config.sparsity.schedule == "constant"  # imp and gmp reach the pattern later
    if checkpoint is not None and config.sparsity.init != "magnitude":
        is_one_shot = False  # what the run began with is gone
    if stage not in rows and is_one_shot:
        rows[stage] = measured(stage, trainer.student, tokenizer, held_out)
    if args.should_save:
        write_results(output, rows, measured)
    check_finite(rows)
    return trainer, rows


def _calibration(
    config: RunConfig,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    training: Blocks,
) -> Blocks | bool:
    """What one-shot pruning is calibrated on; False where a checkpoint brings the masks."""
    settings = config.calibration
    if checkpoint is not None or config.sparsity.init == "magnitude":
        return False
    if settings.data is None:
        return training
    with args.main_process_first(desc="tokenising the calibration text"):
        length = settings.seq_len or config.data.block_size
        data = config.data
        return calibration_blocks(settings.data, data.root, data.text_field, tokenizer, length, bos=data.bos)


def _slorb(config: RunConfig) -> SLoRBConfig | None:
    return config.slorb if config.slorb is not None and config.slorb.enabled else None


def _load_dense(model: ModelConfig) -> PreTrainedModel:
    return load_causal_lm(model.name_or_path, **_load_options(model))


def _random_student(model: ModelConfig, seed: int) -> PreTrainedModel:
    return random_causal_lm(model.name_or_path, seed, **_load_options(model))


def _load_options(model: ModelConfig) -> dict[str, Any]:
    keys = ("revision", "gguf_file", "attn_implementation", "trust_remote_code", "config_overrides")
    return {key: getattr(model, key) for key in keys}


def _teacher(config: RunConfig) -> PreTrainedModel | str | None:
    """The teacher where it is not the student's own start."""
    if config.distillation is None or not config.distillation.needs_teacher:
        return None
    if config.model.teacher is None and config.model.random_weights:
        return _load_dense(config.model)
    return config.model.teacher
