"""SparseTrainer: `transformers.Trainer` that retrains a dense causal LM to N:M sparsity (paper Algorithm 1)."""

import math
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

import ast_sparse
from ast_sparse.config import (
    CalibrationConfig,
    DistillationConfig,
    MixtureConfig,
    SLoRBConfig,
    SparsityConfig,
    WatchConfig,
)
from ast_sparse.data.blocks.collator import DOMAIN, document_borders, make_collator
from ast_sparse.data.blocks.counted import with_counted_tokens
from ast_sparse.data.blocks.domains import DomainBlocks
from ast_sparse.data.calibration import calibration_samples
from ast_sparse.data.tokens.bos import NO_BOS, find_bos
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.distributed.pieces import reshard
from ast_sparse.distributed.ranks import any_rank, errors_shared
from ast_sparse.errors import UserError
from ast_sparse.export.export import ExportReport, export_model
from ast_sparse.kernels.choice import Kernels, choose_kernels
from ast_sparse.kernels.fast_forward import fast_forward
from ast_sparse.kernels.heap import freed_memory_given_back
from ast_sparse.optim import SparseAdamW
from ast_sparse.sparsity.model import SparsityReport, apply_masks, sparse_layers, sparsify_model
from ast_sparse.sparsity.select import decoder_blocks
from ast_sparse.sparsity.slorb import SLoRB
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.origin import Origin, check_saving, saved_with, settings_kept
from ast_sparse.storage.quantized import make_plain
from ast_sparse.storage.sparsity_record import SparsityRecord
from ast_sparse.training.callbacks.flops import FlopsCallback, match_flops, student_parameters, teacher_parameters
from ast_sparse.training.callbacks.late_slorb import LateSLoRB
from ast_sparse.training.callbacks.lines import use_lines
from ast_sparse.training.callbacks.metrics import MetricsCallback, SpeedCallback
from ast_sparse.training.callbacks.mixture import MixtureCallback
from ast_sparse.training.callbacks.sparsity import SparsityCallback
from ast_sparse.training.callbacks.watch import WatchCallback
from ast_sparse.training.checkpointing import CheckpointTrainer
from ast_sparse.training.checks.arguments import check_arguments
from ast_sparse.training.checks.baselines import check_baseline
from ast_sparse.training.checks.inputs import (
    as_blocks,
    block_length,
    check_model,
    check_optimizer,
    check_taught,
)
from ast_sparse.training.checks.mixture import check_mixture
from ast_sparse.training.checks.packing import check_apart
from ast_sparse.training.eval_loss import HeldOutLoss
from ast_sparse.training.frozen_teacher import frozen_teacher
from ast_sparse.training.fsdp import (
    check_shardable,
    check_sharding,
    shard_teacher,
    sharding_plugin,
    without_weights,
)
from ast_sparse.training.loader import block_loader, block_source, load_data_state, make_mixture, save_data_state
from ast_sparse.training.losses import DomainLosses, MicroBatchLoss, find_heads, mean_loss
from ast_sparse.training.resume.checkpoints import check_same_run, resolve_checkpoint, stored_kernels
from ast_sparse.training.resume.same_run import RunRecord

logger = logging.get_logger(__name__)


class SparseTrainer(CheckpointTrainer):
    """Trainer whose student is masked, distilled from its dense self, and saved exactly N:M.

    Args:
        model: dense causal LM in float32, or the name of one. It is made sparse in place.
        args: plain `TrainingArguments`; what AST would ignore is refused by name.
        sparsity_config: pattern and mask settings; default `SparsityConfig()`.
        distillation_config: the loss (4); None trains on cross-entropy alone. With `match_flops` the steps of `args`
            become more; `args` itself is not changed.
        slorb_config: SLoRB adapters; None for none.
        calibration_config: how many sequences `sparsity.init` wanda and sparsegpt measure, and SparseGPT's settings.
        watch_config: what happens when the loss is not finite or jumps; default `WatchConfig()`, which stops at NaN.
        mixture_config: shares of the domains of `train_dataset` and how they change; default: by size, constant.
        calibration_dataset: packed blocks or raw text to measure them on; default the training data. False: start from
            magnitude masks, because a checkpoint brings the masks and weights.
        teacher_model: another teacher, a model or a name; default the dense model itself, frozen before masking.
        train_dataset, eval_dataset: packed blocks (`input_ids`, optionally `labels` with −100 where neither CE nor KL
            counts), raw text, or chat data (`messages`, or `prompt` and `completion`), of which what the assistant says
            is counted; both are tokenised and packed. Blocks of token shards are read where they lie. A mapping of
            names to such is a mixture of domains; the losses held out are then reported by domain.
        text_field, block_size: for raw text; the default block is the model's window, at most 1024 tokens.
        bos: as of `data.bos`, for raw text.
        packing: `documents` keeps the documents of a block apart, for student and teacher; `joined` does not.
        processing_class: the tokenizer, saved with every checkpoint.
        trust_remote_code: run code that comes with a model or teacher given by name.

    Raises:
        UserError: a setting, shape or vocabulary that does not fit, named in one line.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the tokens of the whole accumulated batch

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: TrainingArguments | None = None,
        *,
        sparsity_config: SparsityConfig | None = None,
        distillation_config: DistillationConfig | None = None,
        slorb_config: SLoRBConfig | None = None,
        calibration_config: CalibrationConfig | None = None,
        watch_config: WatchConfig | None = None,
        mixture_config: MixtureConfig | None = None,
        calibration_dataset: Any = None,
        teacher_model: PreTrainedModel | str | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        text_field: str = "text",
        block_size: int | None = None,
        packing: Literal["joined", "documents"] = "joined",
        bos: str = "auto",
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        args = TrainingArguments(output_dir="trainer_output") if args is None else args
        check_arguments(args)
        check_sharding(args)
        if optimizers[0] is not None and not isinstance(optimizers[0], SparseAdamW):
            raise UserError(
                f"optimizers[0] is {type(optimizers[0]).__name__}, which knows no masks. Pass a SparseAdamW, or None."
            )
        for name in ("compute_loss_func", "optimizer_cls_and_kwargs", "model_init"):
            if kwargs.get(name) is not None:
                raise UserError(f"{name} would be ignored: SparseTrainer has its own loss and optimizer. Remove it.")
        model = load_causal_lm(model, trust_remote_code=trust_remote_code) if isinstance(model, str) else model
        make_plain(model, str(getattr(getattr(model, "config", None), "name_or_path", "")))
        check_model(model)
        self._origin = Origin.of(model)
        generation = getattr(model, "generation_config", None)
        check_saving(str(model.config.name_or_path), model.config, generation, processing_class)
        if sharding_plugin(args) is not None:
            check_shardable(model)
        self.sparsity_config = sparsity_config or SparsityConfig()
        self._trained_parameters = student_parameters(model, self.sparsity_config, slorb_config)
        args, matched = match_flops(
            args,
            distillation_config,
            self._trained_parameters,
            lambda: teacher_parameters(teacher_model or model, trust_remote_code),
        )
        check_baseline(self.sparsity_config, slorb_config, args)
        self.distillation_config = distillation_config
        self.slorb_config = slorb_config
        sections = {
            "distillation": None if distillation_config is None else distillation_config.to_dict(),
            "calibration": (calibration_config or CalibrationConfig()).to_dict(),
            "watch": (watch_config or WatchConfig()).to_dict(),
            "data": {"packing": packing, "bos": bos},
        }
        self.run_record = RunRecord(model, args, sections, (mixture_config or MixtureConfig()).type)
        self.teacher, self._renamed = frozen_teacher(
            model, teacher_model, distillation_config, args, processing_class, trust_remote_code
        )
        self.base_model_name = str(model.config.name_or_path)
        block_size = block_length(block_size, model, self.teacher)
        pack = partial(as_blocks, tokenizer=processing_class, text_field=text_field, block_size=block_size, bos=bos)
        found = NO_BOS if processing_class is None else find_bos(bos, processing_class, "bos")
        train_dataset, eval_dataset = pack(train_dataset), pack(eval_dataset)
        if isinstance(train_dataset, dict):
            train_dataset = DomainBlocks(train_dataset)
        calibration_dataset = train_dataset if calibration_dataset is None else calibration_dataset
        if data_collator is None:  # which may make labels of its own
            borders = document_borders(processing_class, packing, bos)
            train_dataset = with_counted_tokens(train_dataset, "train_dataset", borders)
            eval_dataset = with_counted_tokens(eval_dataset, "eval_dataset", borders)
        if isinstance(eval_dataset, DomainBlocks):  # Trainer evaluates a mapping part by part
            eval_dataset = eval_dataset.parts
        self.calibration_config = calibration_config or CalibrationConfig()
        self.sparsity_report: SparsityReport = self._sparsify(model, args, calibration_dataset, pack, found.of_block)
        check_optimizer(optimizers[0], model)
        if packing == "documents":
            check_apart(model, self.teacher, processing_class, args, data_collator)
        with settings_kept(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator or make_collator(processing_class, packing, bos),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                **kwargs,
            )
        use_lines(self)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the tokens of the accumulated batch
        self._loss_shifts_labels = True  # ... and counts shifted labels, whatever the class of the model
        if self.teacher is not None:
            self.run_record.add_teacher(self.teacher)
        plugin = sharding_plugin(self.args)
        self._frame = None if plugin is None else without_weights(cast(PreTrainedModel, self.model))
        if self.teacher is not None and plugin is not None:
            shard_teacher(cast(PreTrainedModel, self.teacher), self.args.device, bool(plugin.reshard_after_forward))
        elif self.teacher is not None:
            self.teacher.to(self.args.device)
        taught = cast(PreTrainedModel | None, self.teacher)
        heads = find_heads(self.student, taught, distillation_config, self.args)
        self._loss = MicroBatchLoss(taught, distillation_config, heads)
        self._needs_logits = True  # where outputs are returned
        taught_by = 0 if self.teacher is None else teacher_parameters(cast(PreTrainedModel, self.teacher))
        self._parts, self._mixture = block_source(train_dataset), None
        self._mixture_config = mixture_config = mixture_config or MixtureConfig()
        if self._parts is not None:
            if isinstance(train_dataset, DomainBlocks):
                check_mixture(mixture_config, self._parts, eval_dataset, self.args)
            self._mixture = make_mixture(self._parts, mixture_config.shares, self.args)
        self.made_optimizer = False  # its settings are those of `args`
        self._compared: Path | None = None  # the checkpoint that this run was compared with
        self._held_out_loss: HeldOutLoss | None = None
        self._domain_losses = DomainLosses(tuple(self._parts or ()))
        self._watch = WatchCallback(watch_config or WatchConfig())
        self._late_slorb = LateSLoRB(slorb_config)
        self._flops = FlopsCallback(self._trained_parameters, taught_by, self.log, matched)
        self._speed = SpeedCallback(6 * self._trained_parameters + 2 * taught_by)
        self._metrics = MetricsCallback()
        self._sparsity = SparsityCallback(
            self.sparsity_config, self.log, self.calibration_config, self.slorb_config, lambda: self._watch.is_empty
        )
        for callback in (self._watch, self._sparsity, self._late_slorb, self._flops, self._speed, self._metrics):
            self.add_callback(callback)
        if self._mixture is not None and isinstance(train_dataset, DomainBlocks):
            self.add_callback(MixtureCallback(self._mixture, mixture_config, self.log))

    def _sparsify(
        self, model: PreTrainedModel, args: TrainingArguments, calibration: Any, pack: Any, front: tuple[int, ...]
    ) -> SparsityReport:
        """Start masks and SLoRB; by wanda and sparsegpt each rank prunes the same model on the same text."""
        config = self.sparsity_config
        if config.init == "magnitude" or calibration is False:
            return sparsify_model(model, replace(config, init="magnitude"), self.slorb_config)
        return sparsify_model(
            model,
            config,
            self.slorb_config,
            calibration_config=self.calibration_config,
            samples=calibration_samples(pack(calibration), self.calibration_config, front),
            device=args.device,
            progress=bool(args.should_log) and not args.disable_tqdm,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in Trainer; blocks of shards come in an order of their own, each when it is trained on."""
        if self._mixture is None:
            return super().get_train_dataloader()
        return block_loader(self.train_dataset, self._mixture, self.data_collator, self.args)

    # ---- loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss (4) of a micro-batch, over the tokens of the whole batch; cross-entropy alone in evaluation.

        Outputs are returned with their logits; in evaluation without metrics, nobody asks for them, and they are None.
        """
        if inputs.get("labels") is None:
            raise UserError("A batch has no labels. Use the default data_collator, or let yours add `labels`.")
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # shifts the labels, not the big logits
        features = {key: value for key, value in inputs.items() if key not in ("labels", DOMAIN)}
        if model.training and self.teacher is not None:
            taught_by = cast(PreTrainedModel, self.teacher).config
            check_taught(inputs["input_ids"], self.student.config, taught_by, self._renamed)
        if "position_ids" in features:
            features["use_cache"] = False  # beside a cache, transformers sees no borders of documents in them
        needs_logits = return_outputs and self._needs_logits
        held_out = None if model.training else self._held_out_loss
        by_domain = model.training and DOMAIN in inputs and self._parts is not None
        by_position = torch.zeros(labels.numel(), device=labels.device) if by_domain or held_out else None
        loss, tokens, outputs = self._loss(model, self.student, features, labels, needs_logits, by_position)
        if by_position is not None and held_out is not None:
            held_out.add(by_position, labels)
        elif by_position is not None:
            self._domain_losses.add(inputs[DOMAIN], by_position, labels)
        if num_items_in_batch is None:
            loss = loss / tokens.clamp(min=1)
        else:
            loss = loss / torch.as_tensor(num_items_in_batch).clamp(min=1)  # 0 in a step that is passed over
            if self.args.average_tokens_across_devices:  # DDP averages gradients over the ranks
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in Trainer; the loss is the mean over all tokens, each counted once."""
        self.shard_student()
        self._held_out_loss = HeldOutLoss(dataloader, self.args)
        try:
            with self._settings_of_trainer():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            loss = self._held_out_loss.mean()
        finally:
            self._held_out_loss = None
            reshard(self.student)
        if output.metrics is not None and loss is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        elif output.metrics is not None:  # Trainer's own would be 0
            output.metrics.pop(f"{metric_key_prefix}_loss", None)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """As in Trainer; logits are made only where they are asked for."""
        self._needs_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._needs_logits = True

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in Trainer; the loss is judged when all micro-batches of the step are done."""
        with ExitStack() as stack:
            if not self.args.torch_compile:  # it does not see what either changes
                stack.enter_context(fast_forward(self.student, self.teacher))
                blocks = list(decoder_blocks(self.student).values())
                stack.enter_context(freed_memory_given_back(blocks, self.args.device))
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._late_slorb.drop_gradients(self.student, self.state)
        self._watch.add(inputs, loss)
        self._speed.count(int(inputs["input_ids"].numel()))
        return loss

    # ---- optimizer -----------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """SparseAdamW over four groups: masked, weight decay, no decay (norms, biases), SLoRB (never decays)."""
        if self.optimizer is not None:
            return self.optimizer
        self.made_optimizer = True
        model = self.student if model is None else model
        masked = {layer.weight for layer in sparse_layers(model).values()}
        slorb = {p for module in model.modules() if isinstance(module, SLoRB) for p in module.parameters()}
        decaying = set(self.get_decay_parameter_names(model))
        groups: dict[str, list[Tensor]] = {"masked": [], "decay": [], "no_decay": [], "slorb": []}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter in masked:
                groups["masked"].append(parameter)
            elif parameter in slorb:
                groups["slorb"].append(parameter)
            else:
                groups["decay" if name in decaying else "no_decay"].append(parameter)
        decays = {"masked", "decay"}
        self.optimizer = SparseAdamW(
            [
                {
                    "params": parameters,
                    "weight_decay": self.args.weight_decay if name in decays else 0.0,
                    "is_masked": name == "masked",
                }
                for name, parameters in groups.items()
                if parameters
            ],
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            # without decay, `gradient` is AdamW itself: what IMP and GMP are trained with
            decay_placement=self.sparsity_config.decay_placement
            if self.sparsity_config.schedule == "constant"
            else "gradient",
        )
        return self.optimizer

    # ---- train, log, save ----------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As in Trainer; at the end pruned weights are exactly 0.0.

        Raises:
            DivergenceError: a loss or gradient is not finite, or as `watch_config` says.
            UserError: the checkpoint is incomplete, or that of another run (`check_resume`).
        """
        if not resume_from_checkpoint:
            self._sparsity.kernels = self._kernels(None)
            with self._settings_of_trainer():
                return _with_logged_loss(super().train(trial=trial, ignore_keys_for_eval=ignore_keys_for_eval))
        checkpoint = resolve_checkpoint(str(self.args.output_dir), resume_from_checkpoint)
        self.check_resume(checkpoint)
        self.check_data_state(checkpoint)
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        last_step = self.args.max_steps if self.args.max_steps > 0 else state.max_steps
        self._sparsity.kernels = self._kernels(stored_kernels(checkpoint))
        if state.global_step < last_step:
            with self._settings_of_trainer():
                return _with_logged_loss(super().train(str(checkpoint), trial, ignore_keys_for_eval))
        # Trainer would do one more step: the run was finished, and stopped before the final save.
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))
        apply_masks(self.student)
        self._metrics.on_train_begin(self.args, self.state, self.control)
        self._flops.on_train_end(self.args, self.state, self.control)
        return TrainOutput(state.global_step, math.nan, {})

    def check_resume(self, checkpoint: Path) -> None:
        """Compare this run with that of a checkpoint, once, and print what may differ and does; on all processes.

        Raises:
            UserError: a setting that decides the weights, the model, the teacher, the tokenizer or the text differs.
        """
        if self._compared != checkpoint.resolve():
            with errors_shared():
                check_same_run(checkpoint, self.sparsity_config, self.slorb_config, self.sparsity_report.pruned)
            self.run_record.check(self, checkpoint)
        self._compared = checkpoint.resolve()

    def check_data_state(self, checkpoint: Path) -> None:
        """Take the history of a mixture from a checkpoint; UserError if its blocks are others."""
        if self._mixture is not None and self._parts is not None:
            load_data_state(checkpoint, self._mixture, self._mixture_config, self._parts)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in Trainer; of a mapping there is also the loss over all of its parts.

        Raises:
            UserError: no token of the data is counted, so there is no loss.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        parts = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(parts, dict) and f"{metric_key_prefix}_loss" not in metrics:
            raise UserError(
                f"There is no {metric_key_prefix}_loss: no token of the data to evaluate on is counted, all labels are "
                "−100. Pass rows with labels."
            )
        if isinstance(parts, dict) and (loss := mean_loss(metrics, parts, metric_key_prefix)) is not None:
            metrics[f"{metric_key_prefix}_loss"] = loss
            self.log({f"{metric_key_prefix}_loss": loss})
        return metrics

    def _kernels(self, stored: Kernels | None) -> Kernels:
        """The kernels of the run; eager on all ranks where one cannot compile, for their weights must stay the same."""
        weights, device = self.sparsity_report.pruned_parameters, self.args.device
        choice = choose_kernels(self.sparsity_config.kernels, weights, device, stored)
        return "eager" if any_rank(choice == "eager", device) else choice

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Trainer, with a perplexity beside each evaluation loss, speed and memory beside each training loss."""
        if "loss" in logs:
            logs.update(self._speed.figures(self.args), **self._watch.figures(), **self._domain_losses.figures())
            self._watch.correct_loss(logs)
        if "train_loss" in logs:
            self._watch.correct_loss(logs, "train_loss")
        for key in [key for key in logs if key.startswith("eval_") and key.endswith("_loss")]:
            logs[f"{key.removesuffix('_loss')}_perplexity"] = math.exp(min(logs[key], 700.0))
        super().log(logs, *args, **kwargs)

    def sparsity_config_dict(self) -> dict[str, Any]:
        """What `sparsity_config.json` says of the run."""
        record = SparsityRecord.of_run(
            version=ast_sparse.__version__,
            base_model=self.base_model_name,
            sparsity=self.sparsity_config,
            slorb=self.slorb_config,
            distillation=self.distillation_config,
            kernels=self._sparsity.kernels,
            layers=self.sparsity_report.pruned,
        )
        return record.to_dict()

    def _save_for_resume(self, folder: Path) -> None:
        super()._save_for_resume(folder)
        if self.args.process_index == 0:
            self.run_record.save(self, folder)
        if self.args.should_save and self._mixture is not None and self._parts is not None:
            save_data_state(folder, self._mixture, self._mixture_config, self._parts)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in Trainer, 6 for each token and parameter outside the embeddings, SLoRB's too; masks are none."""
        return 6 * int(inputs["input_ids"].numel()) * self._trained_parameters

    def export(self, out_dir: str | Path, format: str = "compressed", **kwargs: Any) -> ExportReport | None:
        """Write the masked model in an export format, verified, with its tokenizer; see `export_model`.

        Returns:
            What was written; None on ranks that do not write.
        """
        report, student = None, self.whole_student()
        if self.args.should_save and student is not None:
            with saved_with(student, self._given_settings):
                report = export_model(student, out_dir, format, tokenizer=self._tokenizer, **kwargs)
        self.accelerator.wait_for_everyone()
        return report


def _with_logged_loss(output: TrainOutput) -> TrainOutput:
    """The loss over the steps that have one, as it is logged."""
    return output._replace(training_loss=output.metrics.get("train_loss", math.nan))
