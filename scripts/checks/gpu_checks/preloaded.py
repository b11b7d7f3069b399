"""Imports what the checks use, before a process for each of them is forked; what is not there is left to the check."""

import contextlib
import importlib

_MODULES = (
    "torch", "triton", "transformers.models.llama.modeling_llama", "ast_sparse.run.train",
    "scripts.checks.gpu_checks.bench",
)  # fmt: skip

for _name in _MODULES:
    with contextlib.suppress(Exception):  # whatever a package raises that is half installed
        importlib.import_module(_name)
