"""The perplexities that a run reports: of its stages (dense, one-shot and retrained model) and during training."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from ast_sparse.config import RunConfig
from ast_sparse.data.blocks.domains import DomainBlocks
from ast_sparse.data.sources.documents import read_texts
from ast_sparse.data.tokens.bos import bos_note, find_bos
from ast_sparse.distributed.full_precision import computes_in_float32
from ast_sparse.distributed.pieces import is_sharded
from ast_sparse.errors import DivergenceError, UserError, did_you_mean
from ast_sparse.evaluation.perplexity import (
    NOT_FINITE,
    PerplexityResult,
    default_seq_len,
    evaluate_blocks,
    evaluate_text,
    wikitext2_rows,
)
from ast_sparse.evaluation.samples import continue_prompts
from ast_sparse.kernels.cpu.heap import return_freed_memory
from ast_sparse.storage.stage_results import StageResult, Stages
from ast_sparse.tables import format_table
from ast_sparse.training.fsdp import sharding_plugin

logger = logging.get_logger(__name__)
HELDOUT, WIKITEXT2 = "heldout", "wikitext2"
_FIELD = "evaluation.datasets"


def check_finite(rows: Stages) -> None:
    """Check that the loss of every stage is finite.

    Raises:
        DivergenceError: a loss is not finite; it names stage, data set and window.
    """
    for stage, results in rows.items():
        for name, result in results.items():
            if result.get("bad_window") is not None:
                values: dict[str, Any] = dict(result)
                raise DivergenceError(f"The {stage} model, {name}: {PerplexityResult(**values).fault()}. {NOT_FINITE}")


class Measured:
    """Measures perplexities on `evaluation.datasets`; the texts are read here, before any model is loaded.

    All processes of a run measure together: they share the windows, and have the same results. A model that is sharded
    stays so.

    Args:
        args: decide the device, whether there are progress bars, and whether a measured model that is whole goes back
            to the CPU, to be sharded from there.

    Raises:
        UserError: a text is missing or cannot be read.
    """

    def __init__(self, config: RunConfig, args: TrainingArguments) -> None:
        self.config = config
        self.device = args.device
        self.show = bool(args.should_log) and not args.disable_tqdm
        self.leaves_device = sharding_plugin(args) is not None
        self.texts: dict[str, list[str]] = {}
        self.samples: dict[str, dict[str, str]] = {}  # by stage and prompt, for the report
        settings = config.evaluation
        if settings.data_dir is not None and not Path(settings.data_dir).expanduser().exists():
            raise UserError(f"evaluation.data_dir={settings.data_dir!r} does not exist. Correct or remove it.")
        for name in settings.datasets:
            if name == WIKITEXT2:
                self.texts[name] = wikitext2_rows(data_dir=settings.data_dir, field="evaluation.data_dir")
            elif name != HELDOUT:
                self.texts[name] = self._read(name)
        if settings.steps is not None:
            self._check_keys(args.eval_strategy != "no" or bool(args.eval_on_start))

    @property
    def is_asked(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self.config.evaluation.datasets or self.config.evaluation.report)

    def _read(self, name: str) -> list[str]:
        try:
            return read_texts(name, self.config.data.root, self.config.data.text_field, _FIELD)
        except UserError as error:
            near = did_you_mean(name.replace("_", ""), (HELDOUT, WIKITEXT2))
            raise UserError(f"{error} {near}".rstrip()) from None

    def _check_keys(self, has_held_out: bool) -> None:
        held_out = ("eval", *(f"eval_{domain}" for domain in self.config.data.domains or ())) if has_held_out else ()
        names: dict[str, str] = {}
        for name in self.config.evaluation.datasets:
            if logged_key(name) in {f"{part}_perplexity" for part in held_out}:  # as `Trainer.evaluate` logs them
                raise UserError(
                    f"{_FIELD}: {name!r} would be logged as {logged_key(name)}, as the held-out text is. "
                    "Rename the file, or remove evaluation.steps."
                )
            if (other := names.setdefault(logged_key(name), name)) != name:
                raise UserError(
                    f"{_FIELD}: {other!r} and {name!r} would both be logged as {logged_key(name)}. Rename one of them, "
                    "or remove evaluation.steps."
                )

    def check_lengths(self, tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig) -> None:
        """Check that every text has at least one window.

        Raises:
            UserError: a text is shorter; it names the text.
        """
        window = self.config.evaluation.seq_len or default_seq_len(model_config)
        bos = len(find_bos(self.config.data.bos, tokenizer).tokens)
        for name, rows in self.texts.items():
            tokens = bos + len(tokenizer("\n\n".join(rows), add_special_tokens=False, verbose=False)["input_ids"])
            if tokens < window:
                raise UserError(
                    f"{_FIELD}: {name!r} has {tokens:,} tokens, fewer than one window of {window:,}. "
                    "Name a longer text, or set evaluation.seq_len."
                )

    def note(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """What `bos_note` says about the texts; None if there are none. Held-out text has BOS where training has it."""
        return bos_note(self.config.data.bos, tokenizer, "data.bos") if self.texts else None

    def __call__(
        self,
        stage: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        held_out: Any,
        prompts: bool = True,
    ) -> dict[str, StageResult]:
        """The results of one stage by data set; `stage` and data set label the progress bar.

        For a report the model also continues the prompts, unless `prompts` is False. It computes in float32, as it is
        saved. A whole model is moved to the device only if something is measured.
        """
        settings = self.config.evaluation
        if not self.is_asked:
            return {}
        is_whole = not is_sharded(model)
        if is_whole:
            model.to(self.device)  # type: ignore[arg-type]
        with computes_in_float32(model):
            if settings.report and prompts:
                texts, bos = settings.prompts, self.config.data.bos
                self.samples[stage] = continue_prompts(model, tokenizer, texts, "evaluation.prompts", bos)
            results = self._measure(stage, model, tokenizer, held_out, self.show)
        if is_whole and self.leaves_device:
            model.to("cpu")  # type: ignore[arg-type]
        return_freed_memory(self.device)
        return {name: cast(StageResult, asdict(result)) for name, result in results.items()}

    def during_training(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Any
    ) -> dict[str, float]:
        """Only the perplexities, by the names they are logged under, in the precision of training; without a bar."""
        results = self._measure("training", model, tokenizer, held_out, show=False)
        for name, result in results.items():
            if fault := result.fault():
                logger.warning(f"evaluation.steps, {name}: {fault}.")
        return_freed_memory(self.device)
        return {logged_key(name): result.perplexity for name, result in results.items()}

    def _measure(
        self, stage: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Any, show: bool
    ) -> dict[str, PerplexityResult]:
        settings = self.config.evaluation
        results: dict[str, PerplexityResult] = {}
        for name in settings.datasets:
            bos = self.config.data.bos
            shown: dict[str, Any] = {"shared": True, "progress": show, "label": f"Perplexity, {stage}, {name}"}
            if name == HELDOUT:
                results[name] = evaluate_blocks(model, _as_one(held_out), settings.windows, **shown)
            else:
                seq_len = settings.seq_len or default_seq_len(model.config)
                text = self.texts[name]
                results[name] = evaluate_text(model, tokenizer, text, seq_len, settings.windows, bos=bos, **shown)
        return results


def _as_one(held_out: Any) -> Any:
    """All held-out blocks together, if they are held out by domain."""
    return DomainBlocks(held_out) if isinstance(held_out, dict) else held_out


def logged_key(name: str) -> str:
    """The name of a data set's perplexity in the log."""
    return f"{name if name in (HELDOUT, WIKITEXT2) else Path(name).stem}_perplexity"


class PerplexityCallback(TrainerCallback):
    """Measures the perplexities of `evaluation.datasets` every `evaluation.steps` updates, and logs them.

    The model has the masks of the step and the precision of training; the random state of training does not change.

    Args:
        measure: returns the perplexities of a model by name.
        log: `Trainer.log`.
    """

    def __init__(
        self,
        steps: int,
        measure: Callable[[PreTrainedModel], dict[str, float]],
        log: Callable[[dict[str, float]], None],
    ) -> None:
        self.steps = steps
        self.measure = measure
        self.log = log

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        on_gpu = args.device.type == "cuda"
        with torch.random.fork_rng(devices=[args.device] if on_gpu else []):
            results = self.measure(kwargs["model"])
        due = control.should_log
        self.log(results)
        control.should_log = due  # logging clears it, and the loss of this step would not be logged


def _two_decimals(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.2f}"  # None in a file of results


def results_table(rows: Stages) -> str:
    """Perplexity by stage and data set, with number and length of the windows of each data set."""
    datasets = list(dict.fromkeys(name for stage in rows.values() for name in stage))
    if not datasets:
        return "No perplexity was asked for (evaluation.datasets is empty)."
    first = next(iter(rows.values()))
    headers = ["model"] + [f"{name} ({first[name]['windows']} x {first[name]['seq_len']})" for name in datasets]
    lines = [[stage, *(_two_decimals(row[name]["perplexity"]) for name in datasets)] for stage, row in rows.items()]
    return "Perplexity (windows x tokens)\n" + format_table(headers, lines)
