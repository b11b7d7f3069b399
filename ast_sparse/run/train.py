"""One run of `ast-train`: check, prepare, measure the dense and the one-shot model, train, save, measure again."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from ast_sparse.config import ModelConfig, RunConfig
from ast_sparse.data.blocks.collator import document_borders
from ast_sparse.data.blocks.counted import with_counted_tokens
from ast_sparse.data.blocks.streaming import StreamedBlocks
from ast_sparse.data.build import Blocks, build_datasets
from ast_sparse.data.calibration import calibration_blocks, calibration_samples
from ast_sparse.data.tokens.bos import find_bos
from ast_sparse.distributed.pieces import is_sharded
from ast_sparse.distributed.ranks import errors_shared, gather, lost_processes, once_per_folder, wait_for_all
from ast_sparse.errors import UserError, one_line
from ast_sparse.export.readback import check_saved, check_saved_pieces
from ast_sparse.planning.plan import Hardware, Plan
from ast_sparse.progress import library_bars
from ast_sparse.report.page import run_report, write_report
from ast_sparse.run.checks import CheckedRun, check_batches, check_final, check_token_ids, checked_run, slorb_of
from ast_sparse.run.dry_run import show_costs
from ast_sparse.run.output import clear_for_run, output_folder, read_rows, read_samples, write_results
from ast_sparse.run.preemption import PreemptionCallback
from ast_sparse.run.same_on_all import check_same_evaluations, check_same_folder, check_same_models, check_same_text
from ast_sparse.run.signals import PreemptionSignals
from ast_sparse.run.stages import Measured, PerplexityCallback, check_finite, results_table
from ast_sparse.run.warm_start import load_options, needs_start, warm_start
from ast_sparse.sparsity.model import slorb_set_aside
from ast_sparse.sparsity.oneshot import METHODS
from ast_sparse.storage.locate import load_tokenizer
from ast_sparse.storage.origin import check_saving
from ast_sparse.storage.run_folder import REPORT
from ast_sparse.storage.stage_results import WITHOUT_SLORB, Stages
from ast_sparse.training.resume.same_run import run_settings
from ast_sparse.training.resume.writing import write_errors
from ast_sparse.training.sharding import frame_of
from ast_sparse.training.start.reading import load_student, load_teacher
from ast_sparse.training.trainer import SparseTrainer

logger = logging.get_logger(__name__)
Made = TypeVar("Made")


@lost_processes()
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
    """Run a configuration; the phases are in the module's first line.

    Args:
        output_dir: overrides `training.output_dir`.
        resume: True for the last complete checkpoint in the output folder, or a checkpoint folder; "if started" for
            the last one if the output folder has a started run, for a start if it has none, and for nothing at all if
            its run is finished: for jobs that are started again with the same command.
        overwrite: replace a run in the output folder.
        dry_run: print the plan and stop; no weights are loaded, nothing is written.
        signals: the signals that make the run save and stop.
        hardware: the hardware that a dry run plans for.

    Returns:
        The output folder, or None after a dry run.

    Raises:
        UserError: one line; nothing has been written unless training had begun. After the plan of a dry run: a device
            has too little memory.
        Preempted: a signal was received, and the run can be resumed.
    """
    hardware, signals = hardware or Hardware(), signals or PreemptionSignals()
    run = checked_run(config, output_dir, resume, overwrite, dry_run, hardware, echo, signals)
    if run is None:
        return output_folder(config, output_dir)
    if run.args.should_log:
        echo("\n".join(run.plan.lines()))
    if dry_run:
        show_costs(run, hardware)
        return None
    with errors_shared():
        check_same_models(config)
        measured = Measured(config, run.args)
        check_same_evaluations(config.evaluation.datasets, measured.texts)
        tokenizer = checked_tokenizer(config.model, run.plan)
        measured.check_lengths(tokenizer, run.plan.model_config)
        note = measured.note(tokenizer)
    if note is not None and run.args.should_log:
        run.echo(f"Note: {note}")
    trainer, rows = _prepare(run, tokenizer, measured)
    _train(run, trainer, tokenizer, measured)
    _measure_result(run, trainer, tokenizer, measured, rows)
    return run.output


def _train(run: CheckedRun, trainer: SparseTrainer, tokenizer: PreTrainedTokenizerBase, measured: Measured) -> None:
    """Train, and save the result as an ordinary model."""
    steps = run.config.evaluation.steps
    if steps is not None:
        measure = partial(measured.during_training, tokenizer=tokenizer, held_out=trainer.eval_dataset)
        trainer.add_callback(PerplexityCallback(steps, measure, trainer.log))
    trainer.add_callback(PreemptionCallback(run.signals, trainer.watch))
    with write_errors(run.output):
        trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
        run.signals.finish()
        # without the autocast of training: all stages are measured in float32, as they are saved
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        check_final(trainer.student)
        if sharded := is_sharded(trainer.student):  # all processes meet on the devices for it
            trainer.save_model()
        with errors_shared(), write_errors(run.output):
            if not sharded:
                trainer.save_model()
            trainer.save_state()


def _measure_result(
    run: CheckedRun, trainer: SparseTrainer, tokenizer: PreTrainedTokenizerBase, measured: Measured, rows: Stages
) -> None:
    """Read the saved model back, measure the retrained model, and write results and report."""
    config, output = run.config, run.output
    pattern = config.sparsity.pattern
    stage = f"retrained {pattern}"
    _check_saved(run, trainer)
    rows[stage] = {}  # marks the run as finished, also if nothing is measured
    if measured.is_asked:
        trainer.shard_student()  # a finished run that is resumed was not trained, so not sharded
        student = trainer.student
        rows[stage] = measured(stage, student, tokenizer, trainer.eval_dataset)
        with slorb_set_aside(student) as has_slorb:
            if has_slorb and config.evaluation.datasets:  # what a reader gets who loads the model alone
                without = f"{stage}{WITHOUT_SLORB}"
                rows[without] = measured(without, student, tokenizer, trainer.eval_dataset, prompts=False)
    if run.args.should_save:
        write_results(output, rows, measured)
        run.echo(results_table(rows))
        run.echo(f"Saved {pattern} model to {output}")
        if config.evaluation.report:
            run.echo(f"Wrote {write_report(output / REPORT, run_report(output))}")
    wait_for_all()  # a launcher stops the process that writes when another one ends with an error
    check_finite(rows)


def _check_saved(run: CheckedRun, trainer: SparseTrainer) -> None:
    """Compare the student, which will be measured, with what was saved; on all processes."""
    student = trainer.student
    trusted = run.config.model.trust_remote_code
    if is_sharded(student) and check_saved_pieces(student, frame_of(student), run.output, trusted):
        return
    with errors_shared():
        whole = trainer.whole_student()
        if whole is not None and run.args.should_save:
            check_saved(whole, run.output, trusted)


def checked_tokenizer(model: ModelConfig, plan: Plan) -> PreTrainedTokenizerBase:
    """The tokenizer of the model; also checks, in a temporary folder, that it can be saved."""
    tokenizer = load_tokenizer(
        model.name_or_path,
        revision=model.revision,
        gguf_file=model.gguf_file,
        trust_remote_code=model.trust_remote_code,
    )
    check_saving(model.name_or_path, plan.model_config, tokenizer=tokenizer)
    return tokenizer


def _prepare(run: CheckedRun, tokenizer: PreTrainedTokenizerBase, measured: Measured) -> tuple[SparseTrainer, Stages]:
    """Prepare data, model and trainer, and measure the dense and the one-shot model."""
    config, args, checkpoint = run.config, run.args, run.checkpoint
    every_block, train, held_out = read_data(run, tokenizer)
    with library_bars(not args.disable_tqdm):
        model = dense_student(run)
        teacher = given_teacher(config, args)
    check_token_ids(train, tokenizer, model, teacher, config.model.trust_remote_code)
    rows = read_rows(run.output, config) if checkpoint is not None else {}
    samples = read_samples(run.output, rows) if config.evaluation.report else {}
    rows, measured.samples = gather((rows, samples))[0]  # other nodes may not see the file, but all measure together
    stage = "random" if config.model.random_weights else "dense"
    if stage not in rows:
        rows[stage] = measured(stage, model, tokenizer, held_out)
        check_finite(rows)
    trainer = make_trainer(run, tokenizer, model, teacher, train, held_out)
    trainer.run_record.sections = run_settings(config)
    if checkpoint is not None:
        trainer.check_resume(checkpoint)
    text = start_samples(run, tokenizer, every_block)
    check_same_folder(run.output, trainer.is_fsdp_enabled)
    with run.signals.held():
        if args.should_save:
            clear_for_run(config, run.output, checkpoint, run.overwrite)
        run.signals.restart = "--resume starts it again"  # from the beginning, if there is no checkpoint
    if text is not None:  # now that all checks are passed, and the folder belongs to this run
        warm_start(run, trainer, text)
    stage = f"one-shot {config.sparsity.pattern}"
    is_one_shot = not config.sparsity.is_gradual  # imp and gmp reach the pattern only during training
    if checkpoint is not None and not METHODS[config.sparsity.init].by_magnitude:
        is_one_shot = False  # the masks that the run started with are lost
    if stage not in rows and is_one_shot:
        if measured.is_asked:
            trainer.shard_student()
        rows[stage] = measured(stage, trainer.student, tokenizer, held_out)
    if args.should_save:
        write_results(run.output, rows, measured)
    wait_for_all()
    check_finite(rows)
    return trainer, rows


def read_data(run: CheckedRun, tokenizer: PreTrainedTokenizerBase) -> tuple[Blocks, Any, Any]:
    """All training blocks; those of them to train on, and the held-out blocks, with tokens that the loss counts."""
    data, args = run.config.data, run.args
    with library_bars(not args.disable_tqdm):
        every_block, held_out, data_report = _cached(lambda: build_datasets(data, tokenizer))
    with errors_shared():
        check_same_text("data.train", every_block)
        check_same_text("data.eval" if data.entries("eval") else "data.eval_share", held_out)
    if args.should_log:
        run.echo("\n".join(data_report.lines()))
    borders = document_borders(tokenizer, data.packing, data.bos)
    train = with_counted_tokens(every_block, "data.train", borders, says=False)
    held_out = with_counted_tokens(held_out, "The held-out text", borders, says=False)
    if not isinstance(train, StreamedBlocks):
        check_batches(args, len(train))
    return every_block, train, held_out


def _cached(work: Callable[[], Made]) -> Made:
    """Do work that `datasets` caches, in one process for each cache first.

    Raises:
        UserError: that of one process, or the cache cannot be written; on all processes.
    """

    def checked() -> Made:
        try:
            return work()
        except OSError as error:  # of the cache: sources that cannot be read raise UserError
            raise UserError(
                f"The tokenised text cannot be cached: {one_line(error)}. Set the environment variable "
                "HF_DATASETS_CACHE to a writable folder with enough space."
            ) from error

    return once_per_folder(Path(datasets.config.HF_DATASETS_CACHE), checked)


def make_trainer(
    run: CheckedRun,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    teacher: PreTrainedModel | str | None,
    train: Any,
    held_out: Any,
) -> SparseTrainer:
    """The trainer, which makes the model sparse by magnitude; other masks come from a start or a checkpoint."""
    config = run.config
    try:
        return SparseTrainer(
            model,
            run.args,
            sparsity_config=config.sparsity,
            distillation_config=config.distillation,
            slorb_config=slorb_of(config),
            calibration_config=config.calibration,
            watch_config=config.watch,
            optimizer_config=config.optimizer,
            calibration_dataset=False,
            teacher_model=teacher,
            mixture_config=config.data.mixture if config.data.domains else None,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            packing=config.data.packing,
            bos=config.data.bos,
            trust_remote_code=config.model.trust_remote_code,
        )
    except OSError as error:  # of the output folder, which Trainer creates, or of the hub
        raise UserError(f"training: {one_line(error)}. Correct training.output_dir.") from error


def start_samples(run: CheckedRun, tokenizer: PreTrainedTokenizerBase, training: Blocks) -> Tensor | None:
    """Sequences that the start is calibrated on, `[samples, tokens]` int64; None if the run needs no start.

    Args:
        training: all blocks of the training text.
    """
    data, settings = run.config.data, run.config.calibration
    if not needs_start(run.config, run.checkpoint):
        return None
    blocks, entries, length = training, settings.data, settings.seq_len or data.block_size
    if entries is not None:
        make = partial(calibration_blocks, entries, data.root, data.text_field, tokenizer, length, bos=data.bos)
        blocks = _cached(make)
    with errors_shared():
        return calibration_samples(blocks, settings, find_bos(data.bos, tokenizer).of_block)


def dense_student(run: CheckedRun) -> PreTrainedModel:
    """The dense student; in a sharded run each process has its rows of it."""
    model = run.config.model
    seed = run.args.seed if model.random_weights else None
    untied = run.config.basis is not None and run.config.basis.unties
    return load_student(model.name_or_path, run.args, seed=seed, untied=untied, **load_options(model))


def given_teacher(config: RunConfig, args: TrainingArguments) -> PreTrainedModel | str | None:
    """The teacher, or None if there is none or it is the dense model that the student starts from."""
    if config.distillation is None or not config.distillation.needs_teacher:
        return None
    if config.model.teacher is None and config.model.random_weights:
        return load_teacher(config.model.name_or_path, args, **load_options(config.model))
    return config.model.teacher
