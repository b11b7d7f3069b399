"""A learning-rate range test: short runs from the same start, one for each rate, compared by their held-out loss."""

import copy
import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed
from transformers.trainer_utils import SchedulerType

from ast_sparse.config import RunConfig, SparsityConfig
from ast_sparse.data.blocks.domains import DomainBlocks
from ast_sparse.distributed.full_precision import computes_in_float32
from ast_sparse.distributed.pieces import local
from ast_sparse.distributed.ranks import errors_shared, lost_processes, wait_for_all
from ast_sparse.errors import DivergenceError, UserError, one_line
from ast_sparse.evaluation.perplexity import PerplexityResult, evaluate_blocks
from ast_sparse.kernels.cpu.heap import return_freed_memory
from ast_sparse.planning.plan import Hardware
from ast_sparse.run.checks import CheckedRun, check_choosing, check_token_ids, checked_run
from ast_sparse.run.output import output_folder
from ast_sparse.run.same_on_all import check_same_models
from ast_sparse.run.signals import PreemptionSignals
from ast_sparse.run.train import checked_tokenizer, dense_student, given_teacher, make_trainer, read_data, start_samples
from ast_sparse.run.warm_start import warm_start
from ast_sparse.storage.files import finite_or_none, write_json
from ast_sparse.storage.run_folder import FOUND_RATES, SHORT_RUNS
from ast_sparse.training.eval_loss import perplexity_of
from ast_sparse.training.trainer import SparseTrainer

STEPS = 10
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of training.learning_rate
_HELD_OUT_TOKENS = 1 << 15  # at most; fewer would be noisier, more would take longer than the steps
_BY_LOSS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_ROW = "{:>13}  {:>13}  {:>19}  {:>13}  {:>7}"
_HEADERS = ("learning rate", "held-out loss", "held-out perplexity", "training loss", "seconds")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What the short run with one rate came to.

    Attributes:
        held_out_loss: mean cross-entropy in nats per token, in float32, with masks; None if the run diverged.
        training_loss: mean of the loss (4) over the steps; None if the run diverged.
        fault: what was not finite; None if everything was.
    """

    learning_rate: float
    held_out_loss: float | None
    training_loss: float | None
    seconds: float
    fault: str | None = None

    def row(self) -> str:
        """The line of the table."""
        if self.held_out_loss is None:
            cells = _ROW.format(f"{self.learning_rate:g}", "-", "-", "-", f"{self.seconds:.0f}")
            return f"{cells}  diverged: {self.fault}"
        perplexity = f"{perplexity_of(self.held_out_loss):.2f}"
        losses = (f"{self.held_out_loss:.4f}", perplexity, _four_decimals(self.training_loss))
        return _ROW.format(f"{self.learning_rate:g}", *losses, f"{self.seconds:.0f}")


@lost_processes()
def find_rate(
    config: RunConfig,
    output_dir: str | None = None,
    rates: Sequence[float] | None = None,
    steps: int = STEPS,
    echo: Callable[[str], None] = print,
    signals: PreemptionSignals | None = None,
) -> float | None:
    """Compare learning rates by short runs of a configuration; every process must call this.

    Each run has the schedule of the configuration, warm-up and decay included, compressed to `steps` steps. All see the
    same batches from the same start; calibration runs once. A line is printed as each ends. Nothing is left but
    `find_lr.json` in the output folder of the first process.

    Args:
        output_dir: overrides `training.output_dir`.
        rates: None: 1/4, 1/2, 1, 2 and 4 times `training.learning_rate`.
        steps: of each run.

    Returns:
        The rate with the lowest held-out loss, None if all runs diverged.

    Raises:
        UserError: a setting, the model or the text does not fit, or there is no held-out text.
    """
    signals = signals or PreemptionSignals()
    with errors_shared():
        output = output_folder(config, output_dir)
        rates = _rates(config, rates)
        short = _short(config, steps)
        if not (config.data.entries("eval") or config.data.eval_share > 0):
            raise UserError(
                "--find-lr compares losses of held-out text, and data.eval_share is 0. Set data.eval or "
                "data.eval_share."
            )
        check_choosing(config, "--find-lr", "a learning rate")
    with _folder_of_test(output) as folder:
        run = checked_run(short, str(folder), None, False, False, Hardware(), echo, signals, saves_model=False)
        assert run is not None
        with errors_shared():
            check_same_models(short)
        if run.args.should_log:
            echo("\n".join(run.plan.lines()))
        found, start = _compare(run, rates, steps, output)
        wait_for_all()  # nobody needs the folder any more
    best = min((each for each in found if each.held_out_loss is not None), key=_loss, default=None)
    if run.args.should_log:
        echo("\n".join(_conclusion(found, best, start, steps)))
    wait_for_all()
    return None if best is None else best.learning_rate


@contextmanager
def _folder_of_test(output: Path) -> Iterator[Path]:
    """The folder for what short runs write on their way; whoever writes first makes it, and at the end it is gone.

    So are parents of it that were not there before, and in which nothing was left.
    """
    missing = [each for each in (output, *output.parents) if not each.exists()]
    folder = output / SHORT_RUNS  # the same for all processes: one of them makes the start, and all read it
    shutil.rmtree(folder, ignore_errors=True)  # left by a test that was killed
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # by every process: each node may have its own
        for each in missing:
            with suppress(OSError):  # not empty, or removed by another process
                each.rmdir()


def _loss(candidate: Candidate) -> float:
    return math.inf if candidate.held_out_loss is None else candidate.held_out_loss


def _rates(config: RunConfig, rates: Sequence[float] | None) -> list[float]:
    """The rates to compare, the smallest first."""
    if rates is None:
        base = float(config.training.get("learning_rate", TrainingArguments.learning_rate))
        if base <= 0:
            raise UserError(
                f"training.learning_rate={base:g} has no multiples to compare. Name rates: --find-lr 1e-4,2e-4."
            )
        rates = [base * factor for factor in _FACTORS]
    for rate in rates:
        if not 0 < rate < math.inf:
            raise UserError(
                f"--find-lr {rate:g} is no learning rate. Give numbers above 0, such as --find-lr 1e-4,2e-4."
            )
    return sorted(set(rates))


def _short(config: RunConfig, steps: int) -> RunConfig:
    """The configuration of the short runs: the schedule compressed, nothing saved, evaluated or reported."""
    if steps < 1:
        raise UserError(f"--find-lr-steps {steps} must be 1 or more.")
    training = config.training
    schedule = training.get("lr_scheduler_type", "linear")
    if schedule in [each.value for each in _BY_LOSS]:
        raise UserError(
            f"training.lr_scheduler_type={schedule!r} follows held-out losses, so --find-lr cannot compress it. "
            "Set another type for the test."
        )
    given = training.get("lr_scheduler_kwargs") or {}
    if schedule == "inverse_sqrt" and not training.get("warmup_steps") and isinstance(given, dict):
        own = {"timescale": 10_000}  # of transformers, which takes the warm-up if there is one
        given = {**own, **{key: each for key, each in given.items() if each is not None}}
    names = [key for key in given if key.endswith("_steps") or key == "timescale"]  # the latter of inverse_sqrt
    counts = {key: given[key] for key in names if isinstance(given[key], int)}
    changed: dict[str, Any] = {"max_steps": steps}
    if (warmup := training.get("warmup_steps", 0)) >= 1:
        length = _whole_length(training, "training.warmup_steps", warmup)
        # one that is longer than the run never reaches the whole rate
        changed["warmup_steps"] = warmup / length if warmup < length else -(-warmup * steps // length)
    if counts:
        length = _whole_length(training, "training.lr_scheduler_kwargs", given)
        scaled = {key: -(-value * steps // length) for key, value in counts.items()}  # 0 stays 0
        changed["lr_scheduler_kwargs"] = {**given, **scaled}
    off = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "report_to": "none",
           "eval_on_start": False, "load_best_model_at_end": False, "push_to_hub": False}  # fmt: skip
    distillation = config.distillation and replace(config.distillation, match_flops=False)  # it would add steps
    data = config.data
    if data.mixture.type != "constant":  # its shares change at evaluations, of which there are none
        data = replace(data, update=None)
    return replace(
        config,
        training={**training, **off, **changed},
        sparsity=_short_rounds(config, steps),
        distillation=distillation,
        data=data,
    )


def _short_rounds(config: RunConfig, steps: int) -> SparsityConfig:
    """Settings of the masks, with rounds of IMP as much shorter as the run."""
    sparsity = config.sparsity
    if sparsity.schedule == "imp" and sparsity.rounds > steps:
        raise UserError(
            f"--find-lr-steps {steps} has no room for sparsity.rounds={sparsity.rounds}. Give --find-lr-steps "
            f"{sparsity.rounds} or more."
        )
    if (given := sparsity.steps_per_round) is None:
        return sparsity
    length = _whole_length(config.training, "sparsity.steps_per_round", given)
    # rounded down, so that the last round begins in time
    return replace(sparsity, steps_per_round=max(1, given * steps // length))


def _whole_length(training: dict[str, Any], name: str, value: Any) -> int:
    """The steps of the real run."""
    if training.get("max_steps", -1) <= 0:
        raise UserError(
            f"{name}={value} counts steps, and training.max_steps is not set, so --find-lr does not know the length of "
            "the run. Set max_steps, or for warmup_steps a share below 1."
        )
    return int(training["max_steps"])


def _compare(
    run: CheckedRun, rates: Sequence[float], steps: int, output: Path
) -> tuple[list[Candidate], PerplexityResult]:
    """The candidates, and the held-out loss that all of them start with."""
    config = run.config
    tokenizer = checked_tokenizer(config.model, run.plan)
    every_block, train, held_out = read_data(run, tokenizer)
    chosen = _spread(held_out, config.data.block_size)
    found: list[Candidate] = []
    start: dict[str, torch.Tensor] = {}
    before: PerplexityResult | None = None
    for rate in rates:
        args = copy.copy(run.args)
        args.learning_rate = rate
        mine = replace(run, args=args)
        model, teacher = dense_student(mine), given_teacher(config, args)
        if before is None:
            check_token_ids(train, tokenizer, model, teacher, config.model.trust_remote_code)
        trainer = make_trainer(mine, tokenizer, model, teacher, train, held_out)
        if before is None:
            if (samples := start_samples(mine, tokenizer, every_block)) is not None:
                warm_start(mine, trainer, samples)
            start = _state(trainer.student)
            before = _held_out(trainer, chosen)
            if fault := before.fault():
                raise DivergenceError(f"The one-shot model, held-out text: {fault}. Nothing can be compared.")
            _begin_table(run, before)
        else:
            _restore(trainer.student, start)
        found.append(_try(trainer, rate, chosen))
        if args.should_log:
            run.echo(found[-1].row())
        if args.should_save:
            _write(output, found, before, steps)
        del trainer, model, teacher
        gc.collect()  # a trainer refers to itself
        return_freed_memory(args.device)
    assert before is not None
    return found, before


def _spread(held_out: Any, block_size: int) -> list[Any]:
    """Held-out blocks, as many as have about `_HELD_OUT_TOKENS` tokens, evenly spread over all of them."""
    blocks = DomainBlocks(held_out) if isinstance(held_out, dict) else held_out
    count = min(len(blocks), max(1, _HELD_OUT_TOKENS // block_size))
    return [blocks[index * len(blocks) // count] for index in range(count)]


def _state(student: nn.Module) -> dict[str, torch.Tensor]:
    """Weights, masks and SLoRB of a student on the CPU; this process's pieces in a sharded run."""
    named = (*student.named_parameters(), *student.named_buffers())
    return {name: local(tensor).detach().to("cpu", copy=True) for name, tensor in named}


@torch.no_grad()
def _restore(student: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in (*student.named_parameters(), *student.named_buffers()):
        local(tensor).copy_(state[name])


def _try(trainer: SparseTrainer, rate: float, chosen: Sequence[Any]) -> Candidate:
    """Train with one rate, and measure."""
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, PrinterCallback | ProgressCallback):  # the table has the results
            trainer.remove_callback(callback)
    started = time.perf_counter()
    set_seed(trainer.args.seed)  # measuring and calibrating may have drawn numbers
    training_loss: float | None = None
    held_out_loss: float | None = None
    fault: str | None = None
    try:
        training_loss = finite_or_none(trainer.train().training_loss)
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast
        result = _held_out(trainer, chosen)
        fault = result.fault()
        held_out_loss = None if fault else result.mean_nll
    except DivergenceError as error:
        fault = one_line(error, end="open").split(". ")[0].removeprefix("Training diverged at ")
    seconds = time.perf_counter() - started
    return Candidate(
        learning_rate=rate, held_out_loss=held_out_loss, training_loss=training_loss, seconds=seconds, fault=fault
    )


def _held_out(trainer: SparseTrainer, chosen: Sequence[Any]) -> PerplexityResult:
    """The held-out loss in float32; the processes share the blocks."""
    trainer.shard_student()
    with computes_in_float32(trainer.student):
        return evaluate_blocks(trainer.student, chosen, shared=True, progress=False)


def _begin_table(run: CheckedRun, before: PerplexityResult) -> None:
    if not run.args.should_log:
        return
    run.echo(
        f"Before training: held-out loss {before.mean_nll:.4f}, perplexity {before.perplexity:.2f} "
        f"({before.windows} blocks of {before.seq_len})"
    )
    run.echo(_ROW.format(*_HEADERS))
    run.echo(_ROW.format(*("-" * len(header) for header in _HEADERS)))


def _write(output: Path, found: Sequence[Candidate], before: PerplexityResult, steps: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "steps": steps,
        "held_out_blocks": before.windows,
        "block_size": before.seq_len,
        "loss_before": before.mean_nll,
        "candidates": [asdict(each) for each in found],
    }
    write_json(output / FOUND_RATES, content)


def _conclusion(found: Sequence[Candidate], best: Candidate | None, start: PerplexityResult, steps: int) -> list[str]:
    """The best rate, the option that sets it, and what speaks against trusting it."""
    if best is None:
        return ["All of them diverged. Try smaller rates: --find-lr RATE,RATE,…"]
    lines = [f"Best of these after {steps} steps: --set training.learning_rate={best.learning_rate:g}"]
    if _loss(best) >= start.mean_nll:
        lines.append("No rate made the held-out loss lower than before training: try more steps (--find-lr-steps).")
    if len(found) > 1 and best in (found[0], found[-1]):
        side, sort = ("smallest", "smaller") if best is found[0] else ("largest", "larger")
        lines.append(f"It is the {side} that was tried: {sort} ones may be better (--find-lr RATE,RATE,…).")
    return lines


def _four_decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
