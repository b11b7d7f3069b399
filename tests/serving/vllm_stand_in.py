"""The few names of vLLM that the plug-in uses, so that it is tested where vLLM is not installed.

`scripts/checks/vllm.sh` runs the same plug-in in the real vLLM.
"""

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ROOTS = ("vllm", "ast_sparse.serving.vllm_config", "ast_sparse.serving.vllm_linear")
REGISTERED: dict[str, type] = {}


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @staticmethod
    def get_checkpoint_weight_mapper() -> str:
        return "the mapper of vLLM"


class LinearBase(nn.Module):
    pass


class UnquantizedLinearMethod:
    pass


class _Parameter(nn.Parameter):
    def __new__(cls, data: Tensor, **_: Any) -> "_Parameter":
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: Tensor, output_dim: int, weight_loader: Callable[..., None], input_dim: int | None = None):
        self.output_dim, self.input_dim, self.weight_loader = output_dim, input_dim, weight_loader


def _register(name: str) -> Callable[[type], type]:
    return lambda cls: REGISTERED.setdefault(name, cls)


def modules(stages: int = 1) -> dict[str, types.ModuleType]:
    """The modules by name.

    Args:
        stages: size of the pipeline-parallel group.
    """
    content: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.distributed": {"get_pp_group": lambda: types.SimpleNamespace(world_size=stages)},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {
            "LinearBase": LinearBase, "LinearMethodBase": object, "UnquantizedLinearMethod": UnquantizedLinearMethod,
            "register_weight_loader_v2_supported_method": lambda cls: cls,
        },
        "vllm.model_executor.layers.quantization": {"register_quantization_config": _register},
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        "vllm.model_executor.parameter": {"ModelWeightParameter": _Parameter, "ChannelQuantScaleParameter": _Parameter},
    }  # fmt: skip
    found = {}
    for name, names in content.items():
        found[name] = types.ModuleType(name)
        found[name].__dict__.update(names)
    return found


def install() -> None:
    """Put the stand-in where `import vllm` finds it."""
    sys.modules.update(modules())


class Layer(LinearBase):
    """A linear layer of one tensor-parallel rank, which splits tensors as vLLM does.

    Args:
        method: of the plug-in.
        outputs: rows of each part of the whole layer.
        inputs: columns of the whole layer.
        rank, ranks: which of how many ranks.
        by_input: whether inputs are split among the ranks, instead of the rows of each part.
        groups: how many different heads of keys and values there are, if the parts are queries, keys and values.
    """

    def __init__(
        self, method: Any, outputs: Sequence[int], inputs: int, rank: int = 0, ranks: int = 1, by_input: bool = False,
        groups: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tp_rank, self.by_input, self.method = rank, by_input, method
        copies = [1] * len(outputs)
        if groups is not None:
            self.num_kv_head_replicas = max(ranks // groups, 1)
            copies[1:] = [self.num_kv_head_replicas] * 2
        self.copies = copies
        self.sizes = [size if by_input else size * copy // ranks for size, copy in zip(outputs, copies, strict=True)]
        columns = inputs // ranks if by_input else inputs
        method.create_weights(self, columns, self.sizes, inputs, sum(outputs), torch.float32, weight_loader=self.load)

    def load(self, parameter: Any, tensor: Tensor, part: int | str | None = None) -> None:
        if self.by_input:
            if parameter.input_dim is not None:
                width = parameter.shape[1]
                tensor = tensor.narrow(1, self.tp_rank * width, width)
            parameter.data.copy_(tensor)
            return
        index = {None: 0, "q": 0, "k": 1, "v": 2}.get(part, part)  # type: ignore[arg-type]
        assert isinstance(part, str) == hasattr(self, "num_kv_head_replicas") or part is None
        start, size = sum(self.sizes[:index]), self.sizes[index]
        piece = tensor.narrow(0, self.tp_rank // self.copies[index] * size, size)
        parameter.data[start : start + size].copy_(piece)
