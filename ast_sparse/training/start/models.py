"""The models of a run before its first step: student and teacher, both dense, then the student's first masks."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ast_sparse.config import CalibrationConfig, DistillationConfig, SLoRBConfig, SparsityConfig
from ast_sparse.data.calibration import calibration_samples
from ast_sparse.data.tokens.vocabulary import Renamed
from ast_sparse.distributed.pieces import is_sharded
from ast_sparse.sparsity.model import SparsityReport, sparsify_model
from ast_sparse.sparsity.oneshot import METHODS
from ast_sparse.sparsity.slorb import init_without_text
from ast_sparse.storage.model_kind import check_reloads
from ast_sparse.storage.origin import Origin, check_saving
from ast_sparse.storage.quantized import make_plain
from ast_sparse.training.callbacks.flops import match_flops, student_parameters, teacher_parameters
from ast_sparse.training.checks.baselines import check_baseline
from ast_sparse.training.checks.inputs import check_model, check_recomputing, check_unwrapped
from ast_sparse.training.fsdp import check_shardable, sharding_plugin
from ast_sparse.training.start.blocks import BlockMaker
from ast_sparse.training.start.frozen_teacher import frozen_teacher
from ast_sparse.training.start.preparation import forget_preparation
from ast_sparse.training.start.reading import load_student


@dataclass(frozen=True, kw_only=True)
class DenseModels:
    """Student and teacher before masks are made, and what is known from them.

    Attributes:
        student: the model to make sparse.
        origin: its folder and configuration as loaded.
        teacher: frozen, outside the student's module tree; None if the loss needs none.
        renamed: tokens that the teacher has under other names.
        trained_parameters: as `student_parameters` counts them.
        args: of the run, with the steps that `distillation.match_flops` adds.
        matched: a line that says so, or None if none are added.
    """

    student: PreTrainedModel
    origin: Origin
    teacher: nn.Module | None
    renamed: Renamed
    trained_parameters: int
    args: TrainingArguments
    matched: str | None


def dense_models(
    model: PreTrainedModel | str,
    teacher: PreTrainedModel | str | None,
    args: TrainingArguments,
    sparsity: SparsityConfig,
    slorb: SLoRBConfig | None,
    distillation: DistillationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> DenseModels:
    """Student and teacher of a run, checked together with the number of steps.

    Args:
        model, teacher: models, or their names; None as teacher is the student as it is now.
        args: not changed.
        tokenizer: of the student.
        trust_remote_code: run code that comes with a model.

    Raises:
        UserError: a model cannot be read, trained, sharded or saved, teacher and student do not fit, or a baseline
            needs a different number of steps.
    """
    calibrates = METHODS[sparsity.init].needs_text
    student, origin = _dense_student(model, args, calibrates, tokenizer, trust_remote_code)
    count = student_parameters(student, sparsity, slorb)
    args, matched = match_flops(
        args, distillation, count, lambda: teacher_parameters(teacher or student, trust_remote_code)
    )
    check_baseline(sparsity, slorb, args)
    frozen, renamed = frozen_teacher(student, teacher, distillation, args, tokenizer, trust_remote_code)
    return DenseModels(
        student=student,
        origin=origin,
        teacher=frozen,
        renamed=renamed,
        trained_parameters=count,
        args=args,
        matched=matched,
    )


def _dense_student(
    model: PreTrainedModel | str,
    args: TrainingArguments,
    calibrates: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, Origin]:
    """A model that can be trained and saved, and its origin."""
    if isinstance(model, str):
        # calibration runs the whole model, block by block, on every process
        name, model = model, load_student(model, args, whole=calibrates, trust_remote_code=trust_remote_code)
        check_reloads(model, name)
    check_unwrapped(model)
    make_plain(model, str(getattr(getattr(model, "config", None), "name_or_path", "")))
    check_model(model)
    check_recomputing(model, args)
    forget_preparation(model)  # of another trainer
    origin = Origin.of(model)
    generation = getattr(model, "generation_config", None)
    check_saving(str(model.config.name_or_path), model.config, generation, tokenizer)
    if sharding_plugin(args) is not None and not is_sharded(model):
        check_shardable(model)
    return model, origin


def without_text(sparsity: SparsityConfig, slorb: SLoRBConfig | None) -> tuple[SparsityConfig, SLoRBConfig | None]:
    """Settings that need no text, for a model that gets weights, masks and SLoRB from the files of a start later."""
    slorb = None if slorb is None else replace(slorb, init=init_without_text(slorb))
    return replace(sparsity, init="magnitude"), slorb


def first_masks(
    model: PreTrainedModel,
    sparsity: SparsityConfig,
    slorb: SLoRBConfig | None,
    calibration: CalibrationConfig,
    args: TrainingArguments,
    maker: BlockMaker,
    dataset: Any,
) -> SparsityReport:
    """Add start masks and SLoRB, in place; if the method needs text, each rank uses the same model and text.

    Args:
        maker: packs `dataset`.
        dataset: to calibrate on; False for magnitude masks.
    """
    if dataset is False:
        return sparsify_model(model, *without_text(sparsity, slorb))
    if not METHODS[sparsity.init].needs_text:
        return sparsify_model(model, sparsity, slorb, calibration_config=calibration)
    return sparsify_model(
        model,
        sparsity,
        slorb,
        calibration_config=calibration,
        samples=calibration_samples(maker.pack(dataset), calibration, maker.front),
        device=args.device,
        progress=bool(args.should_log) and not args.disable_tqdm,
    )
