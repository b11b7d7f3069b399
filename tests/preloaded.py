"""What is imported in the process whose forks run the commands of tests; `processes.py` starts it."""

import gc
import importlib

IMPORTED = (
    "ast_sparse.cli.train", "ast_sparse.cli.data", "ast_sparse.cli.eval", "ast_sparse.cli.prune",
    "ast_sparse.run.train", "ast_sparse.training.fsdp", "ast_sparse.planning.plan", "torch.distributed.run",
    "torch.distributed.tensor", "transformers.models.llama.modeling_llama", "tests.processes",
)  # fmt: skip

gc.disable()  # the search for garbage takes a fifth of the time, and there is hardly any
for name in IMPORTED:
    importlib.import_module(name)
gc.freeze()
gc.enable()
