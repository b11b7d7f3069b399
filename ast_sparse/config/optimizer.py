"""Settings of the optimizer that transformers.TrainingArguments does not have."""

from dataclasses import dataclass, field
from typing import Literal

from ast_sparse.config.section import Section, about


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """Where the state of SparseAdamW is kept, and in how many bits."""

    _name = "optimizer"
    offload: bool = field(
        default=False,
        metadata=about(
            "Keep weights, moments and masks in host memory and update them there; the device has the masked weights, "
            "in 16 bits with training.bf16, and gradients. For one GPU; the same steps, but slower ones."
        ),
    )
    moments: Literal["float32", "8bit"] = field(
        default="float32",
        metadata=about(
            "8bit: moments of the masked weights in 2 bytes a weight instead of 8, with other steps; needs torchao."
        ),
    )

    def _validate(self) -> None:
        if self.offload:
            problem = "is for moments on the device: on the host, coding them takes longer than the step. Remove one."
            self._require(self.moments == "float32", "moments", f"with optimizer.offload=True: it {problem}")
