"""What SparseTrainer adds to the checkpoints of `transformers.Trainer`, whole or sharded."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import ast_sparse
from ast_sparse.config import DistillationConfig, MixtureConfig, OptimizerConfig, SLoRBConfig, SparsityConfig
from ast_sparse.data.blocks.domains import Mixture
from ast_sparse.distributed.pieces import is_sharded, local
from ast_sparse.distributed.ranks import any_rank, errors_shared, gather, wait_for_all
from ast_sparse.export.export import ExportReport, export_model
from ast_sparse.sparsity.model import SparsityReport, apply_masks
from ast_sparse.storage.checksums import write_checksums
from ast_sparse.storage.files import SPARSITY_CONFIG_NAME, write_json
from ast_sparse.storage.origin import Origin, Settings, saved_with, settings_kept
from ast_sparse.storage.save import save_sparse_model
from ast_sparse.storage.save_pieces import save_pieces
from ast_sparse.storage.sharded import is_sharded_checkpoint, make_folders, write_sums
from ast_sparse.storage.sparsity_record import SparsityRecord
from ast_sparse.training.callbacks.sparsity import SparsityCallback, sparse_optimizer
from ast_sparse.training.callbacks.watch import divergence
from ast_sparse.training.checks.parallelism import hidden_from_accelerate
from ast_sparse.training.fsdp import gathered, load_moments, load_weights, sharding_plugin, use_plugin
from ast_sparse.training.loader import load_data_state, save_data_state
from ast_sparse.training.resume.best import best_checkpoint, find_best
from ast_sparse.training.resume.checkpoints import check_same_run
from ast_sparse.training.resume.older_runs import count_flops
from ast_sparse.training.resume.same_run import RunRecord
from ast_sparse.training.resume.writing import checkpoint_written, write_errors
from ast_sparse.training.sharding import frame_of, shard_student
from ast_sparse.training.start.model_calls import compilation_hidden
from ast_sparse.training.start.preparation import prepare_again
from ast_sparse.training.start.reduction import accumulation_kept, reduce_every_batch

# The table was checked against this version of transformers; a test compares it with the installed one.
TRANSFORMERS_VERSION = "5.23.0"


class Internal(NamedTuple):
    """A part of transformers that is not public, but that training relies on.

    Attributes:
        name: of the method or attribute.
        parameters: of the method, without `self`; None for an attribute.
        why: what it is used for.
    """

    name: str
    parameters: tuple[str, ...] | None
    why: str


# Every name with a leading underscore that the classes of SparseTrainer override, call, read or set.
TRAINER_INTERNALS = (
    Internal("save_model", ("output_dir", "_internal_call"), "whether it saves a checkpoint to resume, or a model"),
    Internal("_save_checkpoint", ("model", "trial"), "a failed save leaves no folder behind"),
    Internal("_save_optimizer_and_scheduler", ("output_dir",), "sharded state needs an entry for every parameter"),
    Internal("_save_rng_state", ("output_dir",), "the last file of a checkpoint: all ranks have written by then"),
    Internal("_load_from_checkpoint", ("resume_from_checkpoint", "model"), "reads sharded and whole checkpoints"),
    Internal("_issue_warnings_after_load", ("load_result",), "a tied weight is not missing"),
    Internal("_load_best_model", (), "the best checkpoint may be sharded, or not there"),
    Internal("_load_optimizer_and_scheduler", ("checkpoint",), "sharded and whole runs load each other's moments"),
    Internal("_loss_shifts_labels", None, "set, so that Trainer counts the tokens that the loss counts"),
    Internal("_get_grad_norm", ("model", "grad_norm"), "the watch judges the norm that clipping has computed"),
    Internal("_prepare_input", ("data",), "batches are copied without a wait"),
    Internal("_tr_loss", None, "the sum of losses since the last log record, for `finite_loss`"),
    Internal("_globalstep_last_logged", None, "the step of that record"),
)
# The same for the configuration of a model.
CONFIG_INTERNALS = (Internal("_attn_implementation", None, "read, to say which attention was replaced by eager"),)


class CheckpointTrainer(Trainer):
    """Trainer whose checkpoints hold dense weights and masks, and can be resumed by any number of processes.

    A sharded run (FSDP2) writes sharded checkpoints, any other run ordinary ones; each resumes from either.
    """

    base_model_name: str
    _base_commit: str | None
    _trained_parameters: int
    sparsity_config: SparsityConfig
    distillation_config: DistillationConfig | None
    slorb_config: SLoRBConfig | None
    optimizer_config: OptimizerConfig
    sparsity_report: SparsityReport
    run_record: RunRecord
    _sparsity: SparsityCallback  # has the kernels of the run
    _mixture: Mixture | None  # the order of blocks that are read in place; their domains are in `_parts`
    _parts: dict[str, Any] | None
    _mixture_config: MixtureConfig
    _compared: Path | None = None  # the checkpoint that this run was compared with
    _origin: Origin  # of the student
    _best_step: int | None = None  # of the best checkpoint, once it is loaded
    _given_settings: Settings = ()  # those of the student, while its configuration has Trainer's

    @property
    def student(self) -> PreTrainedModel:
        """The model that is trained, without the wrapper of a distributed run or of torch.compile."""
        return cast(PreTrainedModel, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def whole_student(self) -> PreTrainedModel | None:
        """The whole student: itself, or gathered on the CPU of the first process if training is sharded.

        Every process must call this; in a sharded run it is None on all but the first.
        """
        student = self.student
        return gathered(student, frame_of(student)) if is_sharded(student) else student

    def sparsity_config_dict(self) -> dict[str, Any]:
        """The content of `sparsity_config.json`."""
        return SparsityRecord.of_run(
            version=ast_sparse.__version__,
            base_model=self.base_model_name,
            base_commit=self._base_commit,
            trained=self._trained(),
            sparsity=self.sparsity_config,
            slorb=self.slorb_config,
            distillation=self.distillation_config,
            kernels=self._sparsity.kernels,
            layers=self.sparsity_report.pruned,
        ).to_dict()

    def _trained(self) -> dict[str, int]:
        """Steps and tokens that made the present weights; those of the best checkpoint have steps alone."""
        if self._best_step is not None:  # not the state's: at that step there may have been no checkpoint
            return {"steps": self._best_step}
        flops = self.state.total_flos + self.current_flos * self.args.world_size  # the state has those up to a log
        tokens = flops / (6 * self._trained_parameters)  # as `floating_point_ops` counts
        return {"steps": self.state.global_step, "tokens": round(tokens)}

    @contextmanager
    def _settings_of_trainer(self) -> Iterator[None]:
        """Inside, the student has no cache, as in Trainer's training; afterwards its own settings are back."""
        with settings_kept(self.student, self.args.use_cache) as given:
            outer, self._given_settings = self._given_settings, self._given_settings or given
            try:
                yield
            finally:
                self._given_settings = outer

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer, with FSDP2 if it is asked for, also between CPU processes."""
        with hidden_from_accelerate(self.args), accumulation_kept(self.args), compilation_hidden(self.args):
            super().create_accelerator_and_postprocess()
        # a copy from pinned memory, which nobody has to wait for
        self.accelerator.dataloader_config.non_blocking = bool(self.args.dataloader_pin_memory)
        if (plugin := sharding_plugin(self.args)) is not None:
            use_plugin(self.accelerator, plugin, self.args)
            reduce_every_batch(self.accelerator, self.args)
            self.is_fsdp_enabled = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As in Trainer; batches of blocks that are read in place go to the device here, before they are counted."""
        return super().get_batch_samples(map(self._prepare_input, epoch_iterator), num_batches, device)

    def _prepare_input(self, data: Any) -> Any:
        """As in Trainer, but nobody waits for a copy from pinned memory."""
        if isinstance(data, Tensor) and data.is_pinned():
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def shard_student(self) -> None:
        """Shard the student now if it will be sharded and is not yet."""
        if self.is_fsdp_enabled and not is_sharded(self.student):
            shard_student(self.student, self.args)

    def _begin_training(self) -> None:
        """Shard the student if it will be; otherwise let training prepare it, whatever an evaluation has left."""
        self.current_flos = 0  # of a training that was interrupted
        self.shard_student()
        if not self.is_fsdp_enabled:
            prepare_again(self)

    def prepare_student(self) -> None:
        """Make the student ready for an evaluation: in a sharded run accelerate takes it only with the optimizer."""
        self.shard_student()
        if self.is_fsdp_enabled and not isinstance(self.optimizer, AcceleratedOptimizer):
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.create_optimizer())
            self.model_wrapped = self.model

    def true_weights(self) -> AbstractContextManager[None]:
        """Inside, the student has its whole weights; during a run with `optimizer.offload` the device has others."""
        return nullcontext() if self.optimizer is None else sparse_optimizer(self.optimizer).true_weights()

    # ---- save ----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the masked model as an ordinary checkpoint; during training, its dense weights and masks, to resume.

        Raises:
            DivergenceError: weights are not finite; nothing is written.
        """
        with self.true_weights():
            self._save_true_weights(Path(str(output_dir or self.args.output_dir)), _internal_call)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_true_weights(self, folder: Path, _internal_call: bool) -> None:
        self._check_finite()
        if _internal_call and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name):
            self._save_for_resume(folder)
            wait_for_all()  # so one that could not write stops the others before they meet on the devices
            return
        student = None if self._saved_in_pieces(folder) else self.whole_student()
        if not is_sharded(self.student):
            self._write_model(student, folder)
            return
        with errors_shared(), write_errors(Path(str(self.args.output_dir)), folder):  # all processes are here
            self._write_model(student, folder)

    def _write_model(self, student: PreTrainedModel | None, folder: Path) -> None:
        """Write a whole student, or what is missing beside one that was saved in pieces."""
        if self.args.should_save and student is not None:
            with saved_with(student, self._given_settings):
                save_sparse_model(student, folder, self.sparsity_config_dict())
        if self.args.should_save:
            self._origin.complete(folder, self._tokenizer)

    def _saved_in_pieces(self, folder: Path) -> bool:
        """Save a sharded model; False if it is not sharded, or has to be gathered for it."""
        student = self.student
        if not is_sharded(student):
            return False
        frame = frame_of(student)
        with saved_with(frame, self._given_settings):
            return save_pieces(student, frame, folder, self.sparsity_config_dict())

    def export(self, out_dir: str | Path, format: str = "compressed", **kwargs: Any) -> ExportReport | None:
        """Write the masked model in an export format, verified, with its tokenizer; see `export_model`.

        Returns:
            What was written; None on ranks that do not write.
        """
        report, student = None, self.whole_student()
        with errors_shared():
            if self.args.should_save and student is not None:
                with self.true_weights(), saved_with(student, self._given_settings):
                    kwargs = {"tokenizer": self._tokenizer, "record": self.sparsity_config_dict(), **kwargs}
                    report = export_model(student, out_dir, format, **kwargs)
        return report

    def _check_finite(self) -> None:
        """Raise DivergenceError unless all weights are finite, on every process of a sharded run."""
        floating = ((name, each) for name, each in self.student.named_parameters() if each.is_floating_point())
        fault = next((f"`{name}` has" for name, each in floating if not torch.isfinite(local(each)).all()), None)
        if is_sharded(self.student) and any_rank(fault is not None, self.args.device):
            fault = fault or "another process's part of the weights has"
        if fault is not None:
            raise divergence(f"{fault} values that are not finite", self.args, self.state.global_step)

    def _save_for_resume(self, folder: Path) -> None:
        """Save the weights under the names of the live model, the only ones that Trainer can load (fused experts of MoE
        models); in a sharded run only the configuration, because Trainer saves the weights with the optimizer."""
        student: Any = self.student
        if is_sharded(student):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                with saved_with(student, self._given_settings):
                    student.config.save_pretrained(folder)
                    if student.generation_config is not None:
                        student.generation_config.save_pretrained(folder)
        else:
            student.save_pretrained = partial(student.save_pretrained, save_original_format=False)
            try:
                with saved_with(student, self._given_settings):
                    super().save_model(str(folder), _internal_call=True)
            finally:
                del student.save_pretrained
            if self.args.should_save:
                write_checksums(folder)
        if self.args.should_save:
            self._origin.complete(folder, self._tokenizer)
            write_json(folder / SPARSITY_CONFIG_NAME, self.sparsity_config_dict())
        if self.args.process_index == 0:
            self.run_record.save(self, folder)
        if self.args.should_save and self._mixture is not None and self._parts is not None:
            save_data_state(folder, self._mixture, self._mixture_config, self._parts)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase | None:
        return cast(PreTrainedTokenizerBase | None, self.processing_class)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in Trainer, into an empty folder, which is removed if the save fails."""
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with checkpoint_written(folder, removes=self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.student):  # a sharded checkpoint is read into a state that has all entries
            optimizer = sparse_optimizer(self.optimizer)
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                optimizer.state_of(parameter)
            make_folders(Path(output_dir))
            wait_for_all()  # one that cannot make them would leave the others waiting on the devices
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """As in Trainer, then wait for all processes: the next file marks the checkpoint as finished."""
        super()._save_rng_state(output_dir)
        wait_for_all()
        if is_sharded(self.student):
            write_sums(Path(output_dir), self.args.process_index, gather)

    # ---- load ----------------------------------------------------------------------------------------------------

    def check_resume(self, checkpoint: Path) -> None:
        """Compare this run with that of a checkpoint, once, and print allowed differences; on all processes.

        Raises:
            UserError: a setting that decides the weights, or the model, teacher, tokenizer or text, differs.
        """
        if self._compared != checkpoint.resolve():
            with errors_shared():
                pruned = self.sparsity_report.pruned
                lines = check_same_run(checkpoint, self.sparsity_config, self.slorb_config, pruned)
            self.run_record.check(self, checkpoint, lines)
        self._compared = checkpoint.resolve()

    def check_data_state(self, checkpoint: Path) -> None:
        """Load the history of a mixture from a checkpoint; UserError if it has other blocks."""
        if self._mixture is not None and self._parts is not None:
            load_data_state(checkpoint, self._mixture, self._mixture_config, self._parts)

    def load_finished(self, checkpoint: Path) -> bool:
        """Load a run that has done all steps but not the final save; False for any other.

        Trainer would do one more step.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < (self.args.max_steps if self.args.max_steps > 0 else state.max_steps):
            return False
        self.state = state
        state.init_training_references(self, state.max_steps, state.num_train_epochs, None)  # which rank this is
        find_best(state, checkpoint)
        count_flops(state, checkpoint, self._trained_parameters)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))
        apply_masks(self.student)
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self.true_weights():
            self._load_true_weights(resume_from_checkpoint, cast(nn.Module, self.model) if model is None else model)

    def _load_true_weights(self, resume_from_checkpoint: str, model: nn.Module) -> None:
        stored, live = is_sharded_checkpoint(Path(resume_from_checkpoint)), is_sharded(model)
        if stored != live or (self.is_fsdp_enabled and not live):
            load_weights(Path(resume_from_checkpoint), model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As in Trainer, but a tied weight, which is stored under its other name, is not missing."""
        tied = getattr(self.student, "all_tied_weights_keys", None) or {}
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        best = best_checkpoint(self.state)
        self._load_from_checkpoint(str(best))
        self._best_step = int(best.name.rpartition("-")[2])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            find_best(self.state, Path(checkpoint))
            count_flops(self.state, Path(checkpoint), self._trained_parameters)
        sparse_optimizer(self.optimizer).begin_offload(self.student)  # before moments are read, to the host
        with self.true_weights():
            self._load_moments(checkpoint)

    def _load_moments(self, checkpoint: str | None) -> None:
        if checkpoint is None or is_sharded_checkpoint(Path(checkpoint)) == is_sharded(self.student):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = sparse_optimizer(self.optimizer)
        load_moments(Path(checkpoint), self.student, optimizer)
        assert self.lr_scheduler is not None  # made before anything is loaded
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
