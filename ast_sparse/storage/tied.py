"""An output head that shares its weight with the input embedding, and how it gets one of its own."""

from typing import Any

from torch import nn


def configs_of(model: Any) -> list[Any]:
    """The configurations of a model that say whether its embeddings are tied."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config(decoder=True))}
    return [config for config in configs.values() if hasattr(config, "tie_word_embeddings")]


def is_tied(model: Any) -> bool:
    """Whether the output head and the input embedding are one weight."""
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


def untie_head(model: Any) -> int:
    """Give the output head a weight of its own, with the same values, in place.

    Args:
        model: a causal LM; its weights may be on the meta device.

    Returns:
        The number of parameters that this adds; 0 if head and embedding were not tied.
    """
    if not is_tied(model):
        return 0
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in configs_of(model):
        config.tie_word_embeddings = False
    keys = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {key: value for key, value in keys.items() if key != f"{name}.weight"}
    return int(head.weight.numel())


def shared_names(model: Any) -> tuple[str, str] | None:
    """The names of the head's weight and of the embedding's, which a checkpoint of a tied model stores as one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return None if head is None else (f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight")
