"""Which layers of a model are pruned, and why the others stay dense."""

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
from transformers.pytorch_utils import Conv1D

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.layers import SparseLayer, group_dim_of
from ast_sparse.sparsity.reads import read_past_forward

Prunable = nn.Linear | Conv1D

_NOT_TEXT = re.compile(r"vision|visual|image|audio|speech|video|tower|qformer|mtp|nextn", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"[Rr]outer|(Mo_?E(V\d+)?|[Tt]op_?[kK]?\d*)_?Gat(e|ing)(?![a-z])")
_ROUTER_NAME = re.compile(r"(^|_)router(_|$)|experts?_gat(e|ing)$")
_EXPERTS = re.compile(r"(^|_)n(um)?_(?!shared)(\w+_)?experts$|(^|_)experts?_(num|count)$")  # number of experts
_NO_ADAPTERS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # PEFT refuses their out_proj
# PEFT mistakes adapters of layers with these names for those of joined experts, which transformers converts.
_JOINED_BY_PEFT = {"qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"), "mixtral": ("gate", "w1", "w2", "w3")}
_GATE_NAME = ("gate", "gating", "wg")  # routers if next to experts, full-size projections elsewhere


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a causal LM's text decoder by name: the entries of its list of `num_hidden_layers` blocks."""
    config = getattr(model, "config", None)
    text = None if config is None else config.get_text_config(decoder=True)
    depth = getattr(text, "num_hidden_layers", None)
    lists = _lists_of_blocks(model, (type(config), type(text)))
    chosen = {name: blocks for name, blocks in lists.items() if len(blocks) == depth}
    for fits in (lambda name: name.startswith(_text_decoder(model)), lambda name: not _NOT_TEXT.search(name)):
        chosen = {name: blocks for name, blocks in chosen.items() if fits(name)} or chosen
    chosen = chosen or lists
    if not any(len(blocks) == depth for blocks in chosen.values()) and len(chosen) > 1:
        raise UserError(
            f"{type(model).__name__} has several lists of blocks ({', '.join(chosen)}), none with {depth} entries "
            "(num_hidden_layers), as a decoder has that runs each block once. Use a model with such a decoder."
        )
    if not chosen:
        raise UserError(
            f"{type(model).__name__} has no list of decoder blocks (an nn.ModuleList) outside parts with another class "
            "of configuration, so no layer can be selected. Use a model whose decoder is one list of blocks."
        )
    return {f"{name}.{i}": block for name, blocks in chosen.items() for i, block in enumerate(blocks)}


def _lists_of_blocks(model: nn.Module, configs: tuple[type, ...]) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules, except in parts with another class of configuration (towers)."""
    lists: dict[str, nn.ModuleList] = {}
    others: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in (*lists, *others)):
            continue
        own = getattr(module, "config", None)
        if isinstance(own, PreTrainedConfig) and type(own) not in configs:
            others.append(name)
        elif isinstance(module, nn.ModuleList) and len(module):
            lists[name] = module
    return lists


def _text_decoder(model: nn.Module) -> str:
    """The prefix of names in the text decoder, with a dot."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else model
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{name}." if name else ""


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches a layer: its full name, its last parts, or a shell pattern of either."""
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in patterns)


def select_layers(
    model: nn.Module, config: SparsityConfig | None = None, recorded: Collection[str] = ()
) -> tuple[dict[str, Prunable], dict[str, str]]:
    """Find the layers to prune: the linear ones inside the decoder blocks that would compute with their mask.

    Layers that share one weight (Zamba2's shared blocks) appear once, under the first name. Routers stay dense unless
    a pattern of `include` names them.

    Args:
        model: causal LM, dense or already sparse, on any device (also meta).
        config: its `include` and `exclude` patterns narrow the selection.
        recorded: names of layers that are known to be pruned: routers among them are selected.

    Returns:
        The selected layers by name, and by name the reason why others stay dense.

    Raises:
        UserError: no layer is left, or a pattern matches nothing.
    """
    config = config or SparsityConfig()
    inside = tuple(f"{name}." for name in decoder_blocks(model))
    holders = _holders(model)
    experts = _expert_counts(model)
    selected: dict[str, Prunable] = {}
    skipped, linears = dict[str, str](), dict[str, str | None]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            skipped[name] = "embedding"
        elif isinstance(module, nn.Linear | Conv1D):
            if not name.startswith(inside):
                skipped[name] = "outside the decoder blocks"
                continue
            together = holders.get(id(module.weight), {name: module})
            if any(other is not module and other in selected.values() for other in together.values()):
                continue  # pruned under its first name
            router = router_part(model, name, experts)
            if router and name not in recorded and not _names_router(router, name, config.include):
                reason: str | None = "router"
            else:
                reason = _unfit(together, inside) or _left_out(tuple(together), config)
            linears[name] = reason
            if reason is None:
                selected[name] = module
    for name, owner in read_past_forward(model, selected).items():
        linears[name] = f"its weight is read by {owner} outside its forward"
        del selected[name]
    skipped |= {name: reason for name, reason in linears.items() if reason is not None}
    skipped |= _fused(model, inside)
    _check_selection(model, config, selected, linears)
    return selected, skipped


def _holders(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """By the id of each parameter, the modules that have it, by their first name."""
    found: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), {})[name] = module
    return found


def twins(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
    """By layer name, the other modules that have the same weight, by their names."""
    holders = _holders(model)
    found = {name: dict(holders.get(id(layer.weight), {})) for name, layer in layers.items()}
    return {name: {key: m for key, m in others.items() if m is not layers[name]} for name, others in found.items()}


def refuse_adapter(model: Any) -> None:
    """Raise UserError for a model with a PEFT adapter, whose layers would be selected beside those of the model."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            "model has a PEFT adapter: its small matrices would be pruned, and the layers below them not trained. Pass "
            "the model without it, or merged: `model.merge_and_unload().requires_grad_(True)` of a PeftModel."
        )


def _left_out(together: tuple[str, ...], config: SparsityConfig) -> str | None:
    if config.include and not any(_matches(name, config.include) for name in together):
        return "not in sparsity.include"
    if any(_matches(name, config.exclude) for name in together):
        return "in sparsity.exclude"
    return None


def _unfit(together: Mapping[str, nn.Module], inside: tuple[str, ...]) -> str | None:
    """Why a mask on a weight would not work, or None; `together` are all modules that have the weight."""
    for name, module in together.items():
        if not isinstance(module, nn.Linear | Conv1D) or not name.startswith(inside):
            return f"its weight is also that of `{name}`"
        if not isinstance(module, SparseLayer) and not _computes_linear(module):
            return f"{type(module).__name__} is not a plain nn.Linear or Conv1D"
    return None


@torch.no_grad()
def _computes_linear(layer: nn.Module) -> bool:
    """Whether a layer computes `x Wᵀ + b` and nothing else: a subclass is tried on a small example."""
    kind = type(layer)
    if kind in (nn.Linear, Conv1D):
        return True
    if set(layer._parameters) - {"weight", "bias"} or "weight" not in layer._parameters or layer._modules:
        return False
    if layer._buffers or layer._forward_hooks or layer._forward_pre_hooks or not isinstance(layer, nn.Linear):
        return False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight, x = torch.randn(4, 8, device="cpu"), torch.randn(2, 3, 8, device="cpu")
        bias = None if layer.bias is None else torch.randn(4, device="cpu")
        for training in (False, True):
            trial = kind.__new__(kind)
            own = {"in_features": 8, "out_features": 4, "training": training}
            trial.__dict__.update({**vars(layer), **own, "_parameters": {"weight": weight, "bias": bias}})
            try:
                close = all(torch.allclose(kind.forward(trial, s * x), F.linear(s * x, weight, bias)) for s in (1, 100))
            except Exception:  # whatever a layer with other shapes or more arguments raises
                return False
            if not close:
                return False
    return True


def _expert_counts(model: nn.Module) -> set[int]:
    """The numbers of experts of a model, from every setting whose name suggests one."""
    config = getattr(model, "config", None)
    values = {} if config is None else config.get_text_config(decoder=True).to_dict()
    nested = [settings for settings in values.values() if isinstance(settings, dict)]  # DBRX's ffn_config
    named = [value for settings in (values, *nested) for key, value in settings.items() if _EXPERTS.search(str(key))]
    flat = [each for value in named for each in (value if isinstance(value, list | tuple) else [value])]
    return {value for value in flat if isinstance(value, int) and not isinstance(value, bool) and value > 1}


def router_part(model: nn.Module, name: str, experts: Collection[int] = ()) -> str | None:
    """The part of a layer's name that makes it a router, which chooses or weights experts, or None."""
    parts = name.split(".")
    module = model
    for index, part in enumerate(parts):
        parent, module = module, module.get_submodule(part)
        if _ROUTER_NAME.search(part) or _ROUTER_CLASS.search(type(module).__name__):
            return part
        beside = any("expert" in child for child, _ in parent.named_children())
        if part in _GATE_NAME and (beside or _is_narrow(module, parent, parts[:index], experts)):
            return part
    return None


def _is_narrow(module: nn.Module, parent: nn.Module, path: list[str], experts: Collection[int]) -> bool:
    """Whether a gate outside attention has one output, or one per expert, and no layer next to it has as many."""
    if not isinstance(module, nn.Linear) or any("attn" in part or "attention" in part for part in path):
        return False
    others = [child for child in parent.children() if isinstance(child, nn.Linear) and child is not module]
    is_glu = any(child.out_features == module.out_features for child in others)  # multiplied with the gate
    return module.out_features in {1, *experts} and not is_glu


def _names_router(part: str, name: str, include: tuple[str, ...]) -> bool:
    """Whether a pattern names this router, rather than matching it only by a wildcard."""
    return any(
        _matches(name, (pattern,)) and any(key.strip("*?") and fnmatchcase(part, key) for key in pattern.split("."))
        for pattern in include
    )


def _fused(model: nn.Module, inside: tuple[str, ...]) -> dict[str, str]:
    """Matrices inside the decoder blocks that belong to modules other than linear layers, with the reason."""
    found = {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        is_known = isinstance(owner, nn.Linear | Conv1D | nn.Embedding)
        if parameter.dim() >= 2 and name.startswith(inside) and not is_known:
            shape, kind = list(parameter.shape), type(owner).__name__
            found[name] = f"weight of shape {shape} of {kind}, not an nn.Linear"
            if router_part(model, name.rpartition(".")[0]):
                found[name] = f"router, a weight of shape {shape} of {kind}"
    return found


def _check_selection(
    model: nn.Module, config: SparsityConfig, selected: dict[str, Prunable], linears: Mapping[str, str | None]
) -> None:
    for key in ("include", "exclude"):
        for pattern in getattr(config, key):
            if linears and not any(_matches(name, (pattern,)) for name in linears):
                raise UserError(
                    f"sparsity.{key}: {pattern!r} matches no linear layer. Names look like {next(iter(linears))!r}; "
                    "'*' stands for anything.",
                    f"sparsity.{key}",
                )
    if selected:
        return
    own = {reason: name for name, reason in linears.items() if reason is not None and "sparsity." not in reason}
    others = "".join(f" `{name}` stays dense: {reason}." for reason, name in own.items())
    if config.include or config.exclude:
        raise UserError(
            f"No layer is left to prune: {len(linears)} linear layers in the decoder blocks, none selected by "
            f"sparsity.include={list(config.include)} and sparsity.exclude={list(config.exclude)}. Loosen "
            f"them.{others}",
            "sparsity.include",
            "sparsity.exclude",
        )
    raise UserError(
        f"No layer is left to prune: {type(model).__name__} has {len(linears)} linear layers in its decoder blocks"
        f"{', and none of them can be pruned.' if linears else '.'}{others} Use another model."
    )


def takes_slorb(model: nn.Module, name: str) -> bool:
    """Whether PEFT loads an adapter of a layer.

    It does not for layers that fused kernels of Mamba would bypass, or whose names it would change: shared experts and
    dense MLPs of DeepSeek-V3 and others.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    last = name.rpartition(".")[2]
    if kind in _NO_ADAPTERS and last == "out_proj":
        return False
    return last not in _JOINED_BY_PEFT.get(_MODEL_TO_CONVERSION_PATTERN.get(str(kind), ""), ())


def check_shapes(selected: dict[str, Prunable], sparsity: SparsityConfig, slorb: SLoRBConfig | None = None) -> None:
    """Raise UserError for the first layer whose in_features is not a multiple of M, or not divisible by SLoRB's k."""
    for name, layer in selected.items():
        shape = tuple(layer.weight.shape)
        in_features = shape[group_dim_of(layer)]
        if sparsity.structured and in_features % sparsity.m:
            raise UserError(
                f"Cannot build a {sparsity.pattern} mask for `{name}` of shape {shape}: in_features={in_features} is "
                f"not a multiple of {sparsity.m}. Exclude the layer with `sparsity.exclude`.",
                "sparsity.exclude",
            )
        if slorb is not None and slorb.enabled and in_features % slorb.k:
            raise UserError(
                f"slorb.k={slorb.k} does not divide in_features={in_features} of `{name}`. "
                "Choose a k that does, or exclude the layer with `sparsity.exclude`.",
                "slorb.k",
                "sparsity.exclude",
            )
