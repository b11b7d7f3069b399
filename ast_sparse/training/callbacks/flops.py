"""FLOPs of a run: 6 for each token and parameter of the student that multiplies it, and 2 for each of its teacher's.

Also runs of equal FLOPs (Table 11).
"""

import copy
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from ast_sparse.config import DistillationConfig, ModelConfig, SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.layers import group_dim_of, out_by_in
from ast_sparse.sparsity.select import select_layers, takes_slorb
from ast_sparse.storage.locate import load_model_config
from ast_sparse.storage.meta import meta_model
from ast_sparse.storage.tied import is_tied

logger = logging.get_logger(__name__)

_ROUNDING = 1e-9  # of epochs: 4/3 of 3 epochs is 4, and not one step more


def student_parameters(model: PreTrainedModel, sparsity: SparsityConfig, slorb: SLoRBConfig | None) -> int:
    """Parameters of a dense model that multiply each token, with those that SLoRB will add; pruned ones count.

    Embeddings are only looked up; one that is also the output head counts.

    Args:
        model: on any device, including meta.
    """
    count = _multiplied(model)
    if slorb is not None and slorb.enabled:
        selected = select_layers(model, sparsity)[0]
        for layer in [layer for name, layer in selected.items() if takes_slorb(model, name)]:
            rows, columns = out_by_in(layer.weight, group_dim_of(layer)).shape
            count += (rows + columns) * (columns // slorb.k)  # S and X
    return count


def teacher_parameters(teacher: PreTrainedModel | str, trust_remote_code: bool = False) -> int:
    """Parameters of a teacher that multiply each token, as a student's; for a name, from its configuration.

    Raises:
        UserError: there is no such model, or it cannot be built.
    """
    if not isinstance(teacher, str):
        return _multiplied(teacher)
    try:
        config = load_model_config(teacher, trust_remote_code=trust_remote_code)
        place = ModelConfig(name_or_path=teacher, trust_remote_code=trust_remote_code)
        return _multiplied(meta_model(place, config))
    except UserError as error:
        raise UserError(f"model.teacher={teacher!r}: {error}") from None


def _multiplied(model: PreTrainedModel) -> int:
    count = model.num_parameters(exclude_embeddings=True)
    if is_tied(model):  # transformers counts the head of an untied model only
        count += cast(nn.Linear, model.get_output_embeddings()).weight.numel()
    return count


def match_flops(
    args: TrainingArguments, config: DistillationConfig | None, student: int, teacher: Callable[[], int]
) -> tuple[TrainingArguments, str | None]:
    """More steps for a run without a teacher, as many as the FLOPs of the teacher pay for: 4/3 if both are equal.

    Args:
        args: not changed.
        student: its parameters, SLoRB's included.
        teacher: returns the parameters of the teacher that the run does not use.

    Returns:
        A copy of `args` with `max_steps`, or the epochs if they decide, times `(6 student + 2 teacher) / (6 student)`,
        and a line that says so; without `distillation.match_flops`, `args` and None.
    """
    if config is None or not config.match_flops:
        return args, None
    matched = copy.copy(args)
    paid, cost = 6 * student + 2 * teacher(), 6 * student
    if args.max_steps > 0:
        matched.max_steps = -(-args.max_steps * paid // cost)
        change = f"training.max_steps={args.max_steps:,} becomes {matched.max_steps:,}"
    else:
        matched.num_train_epochs = args.num_train_epochs * paid / cost - _ROUNDING
        change = f"training.num_train_epochs={args.num_train_epochs:g} becomes {matched.num_train_epochs:.4g}"
    return matched, f"{change}: distillation.match_flops adds the steps that a teacher's FLOPs pay for"


def flops_of_run(total_flops: float, student: int, teacher: int) -> dict[str, float]:
    """The values that are logged at the end.

    Args:
        total_flops: of the student, as Trainer counts and saves them.
        student, teacher: their parameters; 0 without a teacher.
    """
    return {"student_flops": float(total_flops), "teacher_flops": total_flops * (2 * teacher) / (6 * student)}


class FlopsCallback(TrainerCallback):
    """`student_flops` and `teacher_flops` for the last record of the log, including those before a resume.

    Args:
        student, teacher: their parameters; 0 without a teacher.
        matched: the line of `match_flops`, shown when training begins.
    """

    def __init__(self, student: int, teacher: int, matched: str | None = None) -> None:
        self.student = student
        self.teacher = teacher
        self.matched = matched

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.matched is not None and args.should_log:
            logger.warning(self.matched)

    def log_values(self, state: TrainerState) -> dict[str, float]:
        """As `flops_of_run`, of all steps so far."""
        return flops_of_run(state.total_flos, self.student, self.teacher)
