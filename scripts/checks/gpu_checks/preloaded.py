"""Imports what the checks use, before a process for each of them is forked; what is not there is left to the check."""

import contextlib
import gc
import importlib
import os
import sys

_MODULES = [
    "torch", "triton", "transformers.models.llama.modeling_llama", "ast_sparse.run.train",
    "scripts.checks.gpu_checks.bench",
]  # fmt: skip
_COMPILER = ["torch._dynamo.convert_frame", "torch._inductor.utils", "torch.profiler"]


def _load(names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(Exception):  # whatever a package raises that is half installed
            importlib.import_module(name)


gc.disable()  # until all is imported: hardly any of it is garbage, and looking for it takes a fifth of the time
_load(_MODULES)
# on a GPU nothing is imported that might start CUDA before a fork; checks that compile need transformers too
if os.environ.get("TRITON_INTERPRET") == "1" and "transformers" in sys.modules:
    _load(_COMPILER)
gc.collect()
gc.enable()
gc.freeze()  # otherwise each fork copies most of the memory as soon as it collects garbage
