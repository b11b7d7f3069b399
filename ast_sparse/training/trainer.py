"""SparseTrainer: `transformers.Trainer` that retrains a dense causal LM to N:M sparsity (paper Algorithm 1)."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ast_sparse.config import (
    CalibrationConfig,
    DistillationConfig,
    MixtureConfig,
    OptimizerConfig,
    SLoRBConfig,
    SparsityConfig,
    WatchConfig,
)
from ast_sparse.data.blocks.collator import DOMAIN, make_collator
from ast_sparse.data.blocks.domains import DomainBlocks
from ast_sparse.distributed.pieces import is_sharded
from ast_sparse.kernels.fast_forward import fast_step, is_used
from ast_sparse.sparsity.select import decoder_blocks
from ast_sparse.storage.origin import hub_commit, settings_kept
from ast_sparse.training.callbacks.flops import FlopsCallback, teacher_parameters
from ast_sparse.training.callbacks.forward_trial import ForwardTrial
from ast_sparse.training.callbacks.late_slorb import LateSLoRB
from ast_sparse.training.callbacks.lines import use_lines
from ast_sparse.training.callbacks.metrics import MetricsCallback, SpeedCallback
from ast_sparse.training.callbacks.mixture import MixtureCallback
from ast_sparse.training.callbacks.sparsity import SparsityCallback
from ast_sparse.training.callbacks.watch import WatchCallback, finite_loss
from ast_sparse.training.checks.arguments import check_arguments, check_callback
from ast_sparse.training.checks.inputs import (
    TaughtCollator,
    check_optimizer,
    check_optimizer_settings,
    check_replaced,
    check_taught,
    raise_untaught,
    raising_if_joined,
)
from ast_sparse.training.checks.mixture import check_mixture
from ast_sparse.training.checks.packing import check_apart
from ast_sparse.training.checks.semi_structured import check_semi_structured
from ast_sparse.training.eval_loss import EvaluationTrainer
from ast_sparse.training.fsdp import check_sharding, sharding_plugin
from ast_sparse.training.loader import block_loader, block_source, make_mixture
from ast_sparse.training.losses import DomainLosses, MicroBatchLoss, find_heads, split_batch
from ast_sparse.training.resume.checkpoints import resolve_checkpoint, stored_kernels
from ast_sparse.training.resume.same_run import RunRecord
from ast_sparse.training.sharding import sparsify_sharded
from ast_sparse.training.start.blocks import BlockMaker, block_length
from ast_sparse.training.start.frozen_teacher import place_teacher
from ast_sparse.training.start.model_calls import CompiledDecoders, borders_known, compiles_decoders
from ast_sparse.training.start.models import DenseModels, dense_models, first_masks, without_text
from ast_sparse.training.start.optimizer import kernels_of_run, sparse_adamw
from ast_sparse.training.start.reduction import prepare_ddp, reduce_over_replicas


class SparseTrainer(EvaluationTrainer):
    """Trainer whose student is masked, distilled from its dense self, and saved exactly N:M.

    Args:
        model: dense causal LM in float32, or the name of one. It is made sparse in place. If `shard_student` has
            sharded it, or in a sharded run a name was given, `student` is another model with its weights.
        args: plain `TrainingArguments`; a setting that AST would ignore is refused by name.
        sparsity_config: pattern and mask settings; default `SparsityConfig()`.
        distillation_config: the loss (4); None trains on cross-entropy alone. With `match_flops` the run has more
            steps than `args` says; `args` itself is not changed.
        slorb_config: SLoRB adapters; None for none.
        calibration_config: how many sequences a `sparsity.init` that needs text looks at, and SparseGPT's settings.
        watch_config: what happens when the loss is not finite or jumps; default `WatchConfig()`, which stops at NaN.
        optimizer_config: where the state of the optimizer is kept; default `OptimizerConfig()`, on the device.
        mixture_config: shares of the domains of `train_dataset` and how they change; default: by size, constant.
        calibration_dataset: packed blocks or raw text for that; default the training data. False: start from magnitude
            masks, because masks and weights will come from a checkpoint.
        teacher_model: another teacher, a model or a name; default the dense model itself, frozen before masking.
        train_dataset, eval_dataset: packed blocks (`input_ids`, optionally `labels` with −100 where neither CE nor KL
            counts), raw text, or chat data (`messages`, or `prompt` and `completion`), where only what the assistant
            says is counted; both are tokenised and packed. Blocks of token shards are read in place. A mapping of names
            to data sets is a mixture of domains; held-out losses are then reported by domain.
        text_field, block_size: for raw text; the default block is the model's window, at most 1024 tokens.
        bos: as `data.bos`, for raw text.
        packing: `documents` keeps the documents of a block apart, for student and teacher; `joined` does not.
        processing_class: the tokenizer, saved with every checkpoint.
        trust_remote_code: run code that comes with a model or teacher given by name.

    Attributes:
        watch: judges every step before its update.
        fast_forward: whether steps recompute norms, activations and gates to take less memory. With
            `sparsity.fast_forward=auto` it is off on a GPU, unless the plan of ast-train needs it; it may be set.

    Raises:
        UserError: a setting, shape or vocabulary does not fit; one line names it.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the tokens of the whole accumulated batch
    made_optimizer = False  # its settings are those of `args`
    _compiled: AbstractContextManager[None] = nullcontext()  # in which the models are called
    _filters_losses = False  # during training, if `logging_nan_inf_filter` is set
    _checks_text = True  # in `compute_loss`, which waits for the device, if `get_train_dataloader` is another one

    # long: 26 lines are its arguments
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
        optimizer_config: OptimizerConfig | None = None,
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
        # 1. settings
        args = TrainingArguments(output_dir="trainer_output") if args is None else args
        check_arguments(args, callbacks)
        check_sharding(args)
        check_replaced(optimizers[0], kwargs, args)
        self.sparsity_config = sparsity_config or SparsityConfig()
        self.distillation_config, self.slorb_config = distillation_config, slorb_config
        self.calibration_config = calibration_config or CalibrationConfig()
        self.optimizer_config = optimizer_config or OptimizerConfig()
        check_optimizer_settings(self.optimizer_config, args, optimizers[0], sparsity=self.sparsity_config)
        check_semi_structured(self.sparsity_config, self.optimizer_config, args)
        self.fast_forward = is_used(self.sparsity_config.fast_forward, args.device)
        self._watch_config, self._mixture_config = watch_config or WatchConfig(), mixture_config or MixtureConfig()
        # 2. student and teacher, still dense, and their data
        models = self._take_models(model, teacher_model, args, processing_class, trust_remote_code)
        model, args = models.student, models.args
        self.run_record = self._record(model, args, {"packing": packing, "bos": bos})
        maker = BlockMaker(processing_class, text_field, block_length(block_size, model, self.teacher), packing, bos)
        blocks = maker.of_run(train_dataset, eval_dataset, calibration_dataset, data_collator is not None)
        # 3. masks
        sparsity, slorb, calibration = self.sparsity_config, self.slorb_config, self.calibration_config
        if is_sharded(model):
            if blocks.calibration is False:
                sparsity, slorb = without_text(sparsity, slorb)
            model, self.sparsity_report = sparsify_sharded(model, args, sparsity, slorb)
        else:
            self.sparsity_report = first_masks(model, sparsity, slorb, calibration, args, maker, blocks.calibration)
        check_optimizer(optimizers[0], model)
        if packing == "documents":
            check_apart(model, self.teacher, processing_class, args, data_collator)
        with settings_kept(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator or make_collator(processing_class, packing, bos),
                train_dataset=blocks.train,
                eval_dataset=blocks.held_out,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                **kwargs,
            )
        # 4. loss, order of the blocks, callbacks
        self._prepare_loss()
        self._prepare_order()
        use_lines(self)
        for callback in self._own_callbacks():
            self.add_callback(callback)

    # ---- phases of __init__ --------------------------------------------------------------------------------------

    def _take_models(
        self,
        model: PreTrainedModel | str,
        teacher: PreTrainedModel | str | None,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool,
    ) -> DenseModels:
        """Student and teacher as `dense_models` returns them."""
        sparsity, slorb, distillation = self.sparsity_config, self.slorb_config, self.distillation_config
        models = dense_models(model, teacher, args, sparsity, slorb, distillation, tokenizer, trust_remote_code)
        self.base_model_name = str(models.student.config.name_or_path)
        self._base_commit = hub_commit(models.student.config)
        self.teacher, self._renamed = models.teacher, models.renamed
        self._origin, self._trained_parameters, self._matched = models.origin, models.trained_parameters, models.matched
        return models

    def _record(self, model: PreTrainedModel, args: TrainingArguments, data_settings: dict[str, str]) -> RunRecord:
        """The record of the run that checkpoints keep; the model is still dense."""
        sections = {
            "distillation": None if self.distillation_config is None else self.distillation_config.to_dict(),
            "calibration": self.calibration_config.to_dict(),
            "watch": self._watch_config.to_dict(),
            "data": data_settings,
        }
        return RunRecord(model, args, sections, self._mixture_config.type)

    def _prepare_loss(self) -> None:
        """Tell Trainer how the loss counts, move the teacher to its device, and build the loss."""
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the tokens of the accumulated batch
        self._loss_shifts_labels = True  # ... and counts shifted labels, whatever the class of the model
        plugin = sharding_plugin(self.args)
        if plugin is None:
            prepare_ddp(self.accelerator, self.student, self.args)
        teacher = cast(PreTrainedModel | None, self.teacher)
        if teacher is not None:
            self.run_record.add(teacher)
            place_teacher(teacher, self.args, plugin)
        heads = find_heads(self.student, teacher, self.distillation_config, self.args)
        self._loss = MicroBatchLoss(teacher, self.distillation_config, heads)
        if compiles_decoders(self.args):
            backend, mode = self.args.torch_compile_backend, self.args.torch_compile_mode
            self._compiled = CompiledDecoders((self.student, teacher), backend, mode)

    def _prepare_order(self) -> None:
        """Set the order of blocks that are read in place; Trainer orders all other data."""
        self._parts, self._mixture = block_source(self.train_dataset), None
        if self._parts is not None:
            if isinstance(self.train_dataset, DomainBlocks):
                check_mixture(self._mixture_config, self._parts, self.eval_dataset, self.args)
            self._mixture = make_mixture(self._parts, self._mixture_config.shares, self.args)
        self._domain_losses = DomainLosses(tuple(self._parts or ()))

    def _own_callbacks(self) -> list[TrainerCallback]:
        """The callbacks that act around a step, in this order.

        Trainer calls all their events. There are no events for the methods that this class calls directly: `add`,
        `count` and `drop_gradients` run between the backward pass of a micro-batch and gradient clipping, and need the
        batch; `log_values` and `correct_loss` change a log record before Trainer keeps it.
        """
        taught_by = 0 if self.teacher is None else teacher_parameters(cast(PreTrainedModel, self.teacher))
        self.watch = WatchCallback(self._watch_config)
        self._sparsity = SparsityCallback(
            self.sparsity_config, self.log, self.calibration_config, self.slorb_config, lambda: self.watch.is_empty
        )
        self._late_slorb = LateSLoRB(self.slorb_config)
        self._flops = FlopsCallback(self._trained_parameters, taught_by, self._matched)
        self._speed = SpeedCallback(6 * self._trained_parameters + 2 * taught_by)
        self._metrics = MetricsCallback()
        trial = ForwardTrial(self.sparsity_config, self.optimizer_config)
        mixture = self._mixture if isinstance(self.train_dataset, DomainBlocks) else None
        mixing = [] if mixture is None else [MixtureCallback(mixture, self._mixture_config, self.log)]
        return [self.watch, trial, self._sparsity, self._late_slorb, self._flops, self._speed, self._metrics, *mixing]

    # ---- data and loss -------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in Trainer; blocks of shards and mixtures come in their own order, each read when it is trained on."""
        if self._mixture is not None:
            return block_loader(self.train_dataset, self._mixture, self._taught_collator(), self.args)
        given = self.data_collator
        self.data_collator = collator = self._taught_collator()
        try:
            return raising_if_joined(super().get_train_dataloader(), collator, self.args.world_size)
        finally:
            self.data_collator = given

    def _taught_collator(self) -> Any:
        """The collator of the training text, which also checks that the teacher knows its tokens."""
        if self.teacher is None:
            return self.data_collator
        self._checks_text = False
        configs = self.student.config, cast(PreTrainedModel, self.teacher).config
        return TaughtCollator(self.data_collator, *configs, self._renamed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss (4) of a micro-batch, over the tokens of the whole batch; cross-entropy alone in evaluation.

        Returned outputs have logits, except in evaluation without metrics, where nothing needs them and they are None.
        """
        raise_untaught(inputs)
        if self._checks_text and model.training and self.teacher is not None:
            check_taught(inputs["input_ids"], self.student.config, cast(Any, self.teacher).config, self._renamed)
        features, labels = split_batch(inputs)
        needs_logits = return_outputs and self._needs_logits
        held_out = None if model.training else self._held_out_loss
        by_domain = model.training and DOMAIN in inputs and self._parts is not None
        by_position = torch.zeros(labels.numel(), device=labels.device) if by_domain or held_out else None
        with borders_known(features), self._compiled:
            loss, tokens, outputs = self._loss(model, self.student, features, labels, needs_logits, by_position)
        if by_position is not None and held_out is not None:
            held_out.add(by_position, labels)
        elif by_position is not None:
            self._domain_losses.add(inputs[DOMAIN], by_position, labels)
        if num_items_in_batch is None:
            loss = loss / tokens.clamp(min=1)
        else:
            loss = loss / torch.as_tensor(num_items_in_batch).clamp(min=1)  # 0 in an empty step
            if self.args.average_tokens_across_devices:  # DDP averages gradients over the ranks
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in Trainer; the loss is judged when all micro-batches of the step are done."""
        reduce_over_replicas(self.student, self.accelerator.sync_gradients)
        faster: AbstractContextManager[None] = nullcontext()
        if not self.args.torch_compile:  # which does not see what a fast step changes
            blocks = list(decoder_blocks(self.student).values())
            faster = fast_step(self.student, self.teacher, blocks, self.args.device, self.fast_forward)
        with faster, self._compiled:  # blocks that are computed again in the backward pass must be the same
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._late_slorb.drop_gradients(self.student, self.state)
        self.watch.add(inputs, loss)
        self._speed.count(int(inputs["input_ids"].numel()))
        if not self._filters_losses:
            return loss
        self.args.logging_nan_inf_filter = False  # Trainer looks now; trackers, callbacks and checkpoints see it as set
        return finite_loss(loss, self._tr_loss, self.state.global_step - self._globalstep_last_logged)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in Trainer; the watch sees it too, so that gradients are read once."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.see_norm(norm)
        self.args.logging_nan_inf_filter = self._filters_losses
        return norm

    # ---- train, evaluate, log ------------------------------------------------------------------------------------

    def add_callback(self, callback: Any) -> None:
        """As in Trainer; a tracker that would upload weights before they are masked is refused."""
        check_callback(callback)
        super().add_callback(callback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that was given, otherwise that of `sparse_adamw`."""
        if self.optimizer is None:
            self.made_optimizer = True
            model = self.student if model is None else model
            decaying = set(self.get_decay_parameter_names(model))
            self.optimizer = sparse_adamw(model, decaying, self.args, self.sparsity_config, self.optimizer_config)
        return self.optimizer

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As in Trainer; at the end pruned weights are exactly 0.0.

        Raises:
            DivergenceError: a loss or gradient is not finite, or as `watch_config` says.
            UserError: the checkpoint is incomplete, or belongs to another run (`check_resume`).
        """
        checkpoint, self._best_step = None, None
        if resume_from_checkpoint:
            checkpoint = resolve_checkpoint(str(self.args.output_dir), resume_from_checkpoint)
            self.check_resume(checkpoint)
            self.check_data_state(checkpoint)
        stored = None if checkpoint is None else stored_kernels(checkpoint)
        weights, optimizer = self.sparsity_report.pruned_parameters, self.optimizer_config
        self._sparsity.kernels = kernels_of_run(self.sparsity_config, optimizer, weights, self.args, stored)
        if checkpoint is not None and self.load_finished(checkpoint):
            self.current_flos = 0  # of a training that was interrupted
            # Trainer's handler would call all callbacks, but the others need a training that has begun
            self._metrics.on_train_begin(self.args, self.state, self.control)
            self.state.log_history.append({**self._flops.log_values(self.state), "step": self.state.global_step})
            self._metrics.on_log(self.args, self.state, self.control)
            return TrainOutput(self.state.global_step, math.nan, {})
        self._begin_training()
        self._filters_losses = bool(self.args.logging_nan_inf_filter)
        try:
            with self._settings_of_trainer(), self._sparsity.masked_weights(self.student):
                output = super().train(None if checkpoint is None else str(checkpoint), trial, ignore_keys_for_eval)
        finally:
            self.args.logging_nan_inf_filter, self._filters_losses = self._filters_losses, False
        # the mean over the steps that have a loss, as in the log
        return output._replace(training_loss=output.metrics.get("train_loss", math.nan))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Trainer, with the speed for each training loss, and FLOPs at the end."""
        if "loss" in logs:
            logs.update(self._speed.log_values(self.args) | self.watch.log_values() | self._domain_losses.log_values())
            self.watch.correct_loss(logs)
        if "train_loss" in logs:  # the last record: trackers are closed when our callbacks see the end
            logs.update(self._flops.log_values(self.state))
            self.watch.correct_loss(logs, "train_loss", self.args.device)
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 for each token and parameter that multiplies it: SLoRB and a tied head do, embeddings and masks do not."""
        return 6 * int(inputs["input_ids"].numel()) * self._trained_parameters
