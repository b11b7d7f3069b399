"""Models whose heads do something to the logits."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models import VOCAB, tiny_model

SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=None, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


def changed(factor: float | Tensor = 1.0, shift: float = 0.0, **kwargs: Any) -> PreTrainedModel:
    """A model that changes its logits."""
    model = tiny_model("llama")

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        output["logits"] = output.logits * factor + shift
        return output

    model.register_forward_hook(change)
    return model
