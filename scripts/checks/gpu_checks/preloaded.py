"""Imports what the checks use, before a process for each of them is forked; what is not there is left to the check."""

import contextlib
import gc
import importlib
import os

_MODULES = [
    "torch", "triton", "transformers.models.llama.modeling_llama", "ast_sparse.run.train",
    "scripts.checks.gpu_checks.bench",
]  # fmt: skip
if os.environ.get("TRITON_INTERPRET") == "1":  # on a GPU nothing is imported that might start CUDA before a fork
    _MODULES += ["torch._dynamo.convert_frame", "torch._inductor.utils", "torch.profiler"]

for _name in _MODULES:
    with contextlib.suppress(Exception):  # whatever a package raises that is half installed
        importlib.import_module(_name)
gc.collect()
gc.freeze()  # otherwise each fork copies most of the memory as soon as it collects garbage
