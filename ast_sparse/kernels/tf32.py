"""Float32 products stay what they were: other libraries turn TF32 on for the whole process if a run is compiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def tf32_kept() -> Iterator[None]:
    """Restore after the block whether a GPU may round float32 operands of products to TF32, which has 10 bits.

    With `torch_compile`, transformers turns TF32 on when it reads the settings of a run, and accelerate when it begins
    a run in float32. Without this, perplexities, held-out losses and Hessians would be those of TF32, too.
    """
    backends: Any = torch.backends
    matmul = backends.cuda.matmul
    of_all, of_products = backends.fp32_precision, matmul.fp32_precision
    try:
        yield
    finally:
        backends.fp32_precision = of_all
        if of_products != "tf32" and matmul.fp32_precision == "tf32":
            matmul.allow_tf32 = False  # accelerate sets this older flag; PyTorch refuses two that contradict each other
            matmul.fp32_precision = of_products
