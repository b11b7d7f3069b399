"""Whether a model is a causal LM, the only kind that can be made sparse here, and how its code is called."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ast_sparse.errors import UserError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # the model classes take seconds to import

# families that attend to later tokens unless a setting has the value beside it, and those that always do
_CAUSAL_WITH: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
            *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
            "xmod",
        ),
        ("is_decoder", True),
    ),
    "xlm": ("causal", True), "xlnet": ("attn_type", "uni"),
}  # fmt: skip
_NEVER_CAUSAL = ("cpmant",)


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether AutoModelForCausalLM loads what is saved with this configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING  # takes seconds to import

    known = config.model_type in CONFIG_MAPPING  # else its class is registered, or comes with the model
    kind = CONFIG_MAPPING[config.model_type] if known else type(config)  # a subclass is read back as that of its type
    code = getattr(config, "auto_map", None) or {}
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in code


def check_reloads(model: PreTrainedModel, name: str) -> None:
    """Raise UserError if a model that was loaded by name could not be once it is saved: a part of the one in the files.

    Args:
        model: may be without weights.
    """
    if not is_causal(model.config):
        kind = type(model.config).__name__
        raise UserError(
            f"`{name}`: AutoModelForCausalLM loads the text model alone, a {type(model).__name__}, and would not load "
            f"it again once it is saved with its {kind}. Use a language model without images."
        )


def check_outputs(model: Any) -> None:
    """Raise UserError for a model that is set to return tuples; a module without a configuration passes."""
    if getattr(getattr(model, "config", None), "return_dict", True) is False:
        raise UserError(
            f"{type(model).__name__}: return_dict=False in its configuration makes the model return tuples. Remove the "
            "key."
        )


def check_direction(config: Any, name: str) -> None:
    """Raise UserError for an encoder-decoder, and for a model that sees the tokens that it should predict.

    Args:
        config: of the model; without one of transformers it passes.
        name: of the model, for messages.
    """
    if not isinstance(config, PreTrainedConfig):
        return
    kind = f"`{name}` is a {type(config).__name__}"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{kind}, an encoder-decoder. Use a decoder-only language model.")
    text, needed = config.get_text_config(decoder=True), _CAUSAL_WITH.get(config.model_type)
    setting: tuple[str, Any] | None = None
    if getattr(text, "is_causal", None) is False:
        setting = ("is_causal", True)
    elif getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        setting = ("use_bidirectional_attention", False)
    elif needed is not None and getattr(config, needed[0], None) != needed[1]:
        setting = needed
    elif config.model_type not in _NEVER_CAUSAL:
        return
    fix = f", or set `{setting[0]}` to {shown(setting[1])} in its configuration" if setting else ""
    raise UserError(
        f"{kind} that attends in both directions: it sees the tokens that it should predict. Use a decoder-only "
        f"language model{fix}."
    )


def without_cache(model: Any) -> dict[str, bool]:
    """The argument that keeps a call from making a cache; none if code that comes with the model does not take it."""
    taken = inspect.signature(model.forward).parameters.values()
    takes = any(each.name == "use_cache" or each.kind is each.VAR_KEYWORD for each in taken)
    return {"use_cache": False} if takes else {}
