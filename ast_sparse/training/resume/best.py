"""The best checkpoint of a run, which `training.load_best_model_at_end` loads, also after the run was moved."""

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ast_sparse.errors import UserError
from ast_sparse.storage.files import INDEX_NAME, WEIGHTS_NAME
from ast_sparse.storage.sharded import is_sharded_checkpoint


def find_best(state: TrainerState, checkpoint: Path) -> None:
    """Let a state name its best checkpoint beside the one that it was read from, if it is there.

    The file has the path as the run wrote it: that of a folder which was moved since, or one from another working
    directory. Trainer forgets a best checkpoint that is not there, so the state may name none any more.

    Args:
        state: changed in place.
        checkpoint: the folder that it was read from.
    """
    named = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).best_model_checkpoint
    best = None if named is None else checkpoint.parent / Path(named).name
    if best is not None and best.is_dir():
        state.best_model_checkpoint = str(best)


def best_checkpoint(state: TrainerState) -> Path:
    """The folder of the best checkpoint that a state names.

    Raises:
        UserError: it has no weights; Trainer would keep those that the model happens to have.
    """
    best = Path(str(state.best_model_checkpoint))
    if not is_sharded_checkpoint(best) and not any((best / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        raise UserError(
            f"training.load_best_model_at_end=True: the best checkpoint {str(best)!r} has no weights. Put it back, or "
            "set load_best_model_at_end: false, which keeps the last weights, and use --resume."
        )
    return best
