"""`ast-train` whose second rank has a loss that is not a number in its second step; `test_ddp.py` runs it.

Each rank writes its process number into the folder `$PIDS`.
"""

import os
from pathlib import Path
from typing import Any

from ast_sparse.cli.train import main
from ast_sparse.training.trainer import SparseTrainer

compute_loss = SparseTrainer.compute_loss


def troubled(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    loss = compute_loss(self, model, *args, **kwargs)
    is_troubled = model.training and os.environ["RANK"] == "1" and self.state.global_step == 1
    return loss * float("nan") if is_troubled else loss


if __name__ == "__main__":
    SparseTrainer.compute_loss = troubled  # type: ignore[method-assign]
    Path(os.environ["PIDS"], os.environ["RANK"]).write_text(str(os.getpid()))
    main()
