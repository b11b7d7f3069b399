"""Models without values: their parameters are on the meta device and take no memory; their buffers are real."""

import warnings
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ast_sparse.distributed.pieces import unwrapped_name


def frame_of_config(
    config: PreTrainedConfig, attn_implementation: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """A causal LM without values, for float32, in evaluation mode.

    Buffers that no file holds (rotary frequencies) have the values that `from_pretrained` gives them.
    """
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with (
        torch.random.fork_rng(devices=[]),
        init_empty_weights(include_buffers=False),
        warnings.catch_warnings(action="ignore"),
    ):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code, **attention
        )
    model.tie_weights()  # each parameter was replaced by an empty one of its own
    return cast(PreTrainedModel, model.eval())


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names of the state dict, tied ones under each of their names."""
    named = model.named_parameters(remove_duplicate=False)
    return {unwrapped_name(name): parameter for name, parameter in named}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and stored buffers, by the names of the state dict."""
    once = {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}
    every, stored = parameters_of(model), model.state_dict(keep_vars=True)
    return {**once, **{name: value for name, value in stored.items() if name not in every}}
