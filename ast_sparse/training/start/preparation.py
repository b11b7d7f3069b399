"""What accelerate leaves on a model that it has prepared: a mark, and a forward pass in the dtype of that run."""

from typing import cast

from accelerate.utils.operations import ConvertOutputsToFp32
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

_MARK, _FORWARD = "_is_accelerate_prepared", "_original_forward"


def forget_preparation(model: nn.Module) -> bool:
    """Take off what accelerate has left on a model, in place; return whether there was anything.

    accelerate takes a marked model as it is. The mark of an evaluation, or of another trainer, would keep DDP from the
    model, so that each process follows its own gradients, and with it the autocast and compilation of this run.
    """
    was_marked = model.__dict__.pop(_MARK, None) is not None
    given = model.__dict__.pop(_FORWARD, None)
    if given is not None and isinstance(getattr(model.forward, "__wrapped__", None), ConvertOutputsToFp32):
        del model.forward
        if model.forward != given:  # it was not the method of the class
            model.forward = given
    return was_marked or given is not None


def prepare_again(trainer: Trainer) -> None:
    """Let the training that follows prepare the model itself, unless DDP has it already; not for a sharded model.

    An evaluation outside training prepares the model for itself alone: it wraps it in torch.compile, but not in DDP.
    """
    model, outer = cast(nn.Module, trainer.model), trainer.model_wrapped
    if isinstance(getattr(outer, "_orig_mod", outer), DistributedDataParallel):  # inside torch.compile
        return
    trainer.model_wrapped = model
    if forget_preparation(model):
        trainer.accelerator.free_memory()  # otherwise an evaluation would still take the model for prepared
