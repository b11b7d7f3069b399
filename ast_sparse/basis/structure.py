"""What reads and writes the residual stream of a causal LM, found by running it on a few tokens.

No list of families is needed: a layer whose input is the output of one of its block's norms reads the stream, the
layer that runs after such readers and has the stream's width writes to it. Anything else is refused. Whoever changes a
model by this structure must compare its logits: the structure cannot see everything that a model computes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ast_sparse.errors import UserError
from ast_sparse.sparsity.layers import group_dim_of, out_by_in
from ast_sparse.sparsity.select import decoder_blocks
from ast_sparse.storage.model_kind import without_cache

_TOKENS = 16  # run to see the structure
_FUSED_QKV = ("c_attn", "qkv_proj")  # one layer makes queries, keys and values, the values last
_CLOSE = 1e-4


@dataclass(frozen=True)
class Unit:
    """A part of a block that reads the stream through a norm and adds to it: attention, or an MLP.

    Attributes:
        norm: its output is the input of the readers.
        readers: the linear layers that read the stream, by full name.
        writer: the linear layer whose output is added to the stream, and its full name.
        heads: of attention: number of key-value heads, queries per head, head size; None in an MLP.
        sources: where the rows begin that make the writer's input: in attention those of the values (`heads[0] *
            heads[2]` rows, each for the columns of `heads[1]` queries), in an MLP one row per column and source. Empty
            if they are not known; the writer's columns then keep their order.
    """

    norm: Any
    readers: dict[str, nn.Module]
    writer: nn.Module
    writer_name: str
    heads: tuple[int, int, int] | None
    sources: tuple[tuple[nn.Module, int], ...]

    @property
    def linears(self) -> dict[str, nn.Module]:
        """All linear layers by full name."""
        return {**self.readers, self.writer_name: self.writer}


@dataclass(frozen=True)
class Structure:
    """The residual stream of a model.

    Attributes:
        width: channels of the stream.
        blocks: by name, the units of each block in the order in which they run.
        embeddings: the modules whose rows enter the stream: of tokens, of positions.
        norms: all norms of the stream, inside blocks and outside.
        outer_norms: those outside the blocks; the last one feeds the head.
        head: the output head; its weight may be that of the first embedding.
    """

    width: int
    blocks: dict[str, list[Unit]]
    embeddings: list[Any]
    norms: list[Any]
    outer_norms: list[Any]
    head: Any

    @property
    def units(self) -> Iterator[Unit]:
        """The units of all blocks."""
        return (unit for units in self.blocks.values() for unit in units)

    @property
    def is_tied(self) -> bool:
        """Whether the output head has the weight of the embedding."""
        return self.head.weight is self.embeddings[0].weight


def weight_of(layer: Any) -> Tensor:
    """The weight of a linear layer as a view `[out, in]`, without gradients."""
    return out_by_in(layer.weight.data, group_dim_of(layer))


def refusal(model: nn.Module, reason: str) -> UserError:
    """The error for a model whose basis cannot be changed."""
    return UserError(
        f"The basis of {type(model).__name__} cannot be changed: {reason}. Prune this model without a change of basis."
    )


@torch.no_grad()
def find_structure(model: nn.Module, samples: Tensor) -> Structure:
    """The structure of a dense causal LM; the model does not change.

    Args:
        model: on any device that can run it.
        samples: `[sequences, tokens]` int64; the first tokens of the first are run.

    Raises:
        UserError: a part of the model neither reads nor writes the stream in a known way, or weights are shared.
    """
    embedding, head = _ends(model)
    width = embedding.weight.shape[1]
    blocks = decoder_blocks(model)
    inside = tuple(f"{name}." for name in blocks)
    norms = {name: _norms(block, width) for name, block in blocks.items()}
    with _watched(model, blocks, norms) as trace:
        _run(model, samples[:1, :_TOKENS])
    outer = [
        (name, module)
        for name, module in model.named_modules()
        if not name.startswith(inside) and module is not head and any(True for _ in module.parameters(recurse=False))
    ]
    embeddings = [embedding, *(m for _, m in outer if isinstance(m, nn.Embedding) and m is not embedding)]
    outer_norms = [module for _, module in outer if _is_norm(module, width)]
    found = {name: _units(model, name, trace, width) for name in blocks}
    every = [*(norm for each in norms.values() for norm in each), *outer_norms]
    structure = Structure(width, found, embeddings, every, outer_norms, head)
    _check_coverage(model, structure)
    return structure


def _ends(model: Any) -> tuple[Any, Any]:
    """The embedding of the tokens and the output head."""
    embedding, head = (getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output"))
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise refusal(model, "it has no nn.Embedding as input or no nn.Linear as output head")
    if embedding.weight.shape[1] != head.in_features:
        raise refusal(model, f"embedding and head have {embedding.weight.shape[1]} and {head.in_features} channels")
    return embedding, head


def _is_norm(module: Any, width: int) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.shape == (width,) and not module._modules


def _norms(block: nn.Module, width: int) -> list[nn.Module]:
    """The norms of the stream in a block: its own children, since those inside attention act on heads."""
    return [module for module in block.children() if _is_norm(module, width)]


@dataclass
class _Trace:
    """What ran in each block; tensors are kept, so that no memory is used twice."""

    linears: dict[str, list[tuple[str, nn.Module, Tensor]]] = field(default_factory=dict)  # name, layer, input
    norms: dict[tuple[int, int], nn.Module] = field(default_factory=dict)  # by output
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def _watched(
    model: nn.Module, blocks: Mapping[str, nn.Module], norms: Mapping[str, list[nn.Module]]
) -> Iterator[_Trace]:
    trace = _Trace()

    def linear(block: str, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            trace.linears.setdefault(block, []).append((name, module, args[0]))

        return see

    def norm(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            trace.norms[_key(output)] = module
            trace.outputs.append(output)

    handles = []
    for block_name, block in blocks.items():
        handles += [module.register_forward_hook(norm) for module in norms[block_name]]
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                handles.append(module.register_forward_hook(linear(block_name, f"{block_name}.{name}")))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _key(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _run(model: Any, tokens: Tensor) -> Tensor:
    """Logits of tokens `[sequences, tokens]`, without dropout."""
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        logits: Tensor = model(input_ids=tokens.to(device), **without_cache(model)).logits
        return logits
    finally:
        model.train(was_training)


@torch.no_grad()
def sample_logits(model: nn.Module, samples: Tensor, tokens: int = 128) -> Tensor:
    """Logits `[2, tokens, vocabulary]` of the start of the first two samples, to compare a model with itself."""
    return _run(model, samples[:2, :tokens])


def _units(model: nn.Module, block: str, trace: _Trace, width: int) -> list[Unit]:
    units, readers = [], dict[str, nn.Module]()
    norm = None
    for name, layer, inputs in trace.linears.get(block, []):
        reads = trace.norms.get(_key(inputs))
        if reads is not None:
            if norm is not None and readers and reads is not norm:
                raise refusal(model, f"`{name}` reads another norm than the layer before it")
            norm, readers = reads, {**readers, name: layer}
        elif norm is not None and readers and len(weight_of(layer)) == width:
            units.append(_unit(model, norm, readers, name, layer))
            norm, readers = None, {}
        else:
            raise refusal(model, f"`{name}` neither reads the residual stream through a norm nor writes to it")
    if readers:
        raise refusal(model, f"what `{next(iter(readers))}` reads is not written back by a linear layer")
    return units


def _unit(model: Any, norm: nn.Module, readers: dict[str, nn.Module], name: str, writer: nn.Module) -> Unit:
    columns = weight_of(writer).shape[1]
    if not any("attn" in part or "attention" in part for part in name.split(".")):
        return Unit(norm, readers, writer, name, None, _neurons(readers, columns))
    config = model.config.get_text_config(decoder=True)
    queries = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or queries
    if columns % queries or queries % kv_heads:
        return Unit(norm, readers, writer, name, None, ())
    heads = kv_heads, queries // kv_heads, columns // queries
    return Unit(norm, readers, writer, name, heads, _values(readers, heads[0] * heads[2]))


def _neurons(readers: Mapping[str, nn.Module], columns: int) -> tuple[tuple[nn.Module, int], ...]:
    """Rows of an MLP's readers that make its neurons: one layer or two, or two in one (gate, then up)."""
    sources = []
    for layer in readers.values():
        rows = len(weight_of(layer))
        if rows == columns or (rows == 2 * columns and len(readers) == 1):
            sources += [(layer, start) for start in range(0, rows, columns)]
        else:
            return ()
    return tuple(sources)


def _values(readers: Mapping[str, nn.Module], rows: int) -> tuple[tuple[nn.Module, int], ...]:
    for name, layer in readers.items():
        last, found = name.rpartition(".")[2], len(weight_of(layer))
        if (last == "v_proj" and found == rows) or (last in _FUSED_QKV and len(readers) == 1 and found >= 3 * rows):
            return ((layer, found - rows),)
    return ()


def _check_coverage(model: nn.Module, structure: Structure) -> None:
    """Every parameter must belong to the stream in a known way, or lie inside attention (norms of heads)."""
    linears = [layer for unit in structure.units for layer in unit.linears.values()]
    modules = [*structure.embeddings, *structure.norms, *linears, structure.head]
    known = {id(module) for module in modules}
    attention = {
        unit.writer_name.rpartition(".")[0] for unit in structure.units if unit.heads is not None and unit.sources
    }
    seen: dict[int, str] = {}
    if len(linears) != len({id(layer) for layer in linears}):
        raise refusal(model, "a layer runs more than once")
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            of_head = parameter.dim() == 1 and any(name.startswith(f"{place}.") for place in attention)
            if id(module) not in known and not of_head:
                raise refusal(model, f"`{name}.{key}` is no part of the residual stream that is understood")
            other = seen.setdefault(id(parameter), name)
            if other != name and not (module is structure.head and structure.is_tied):
                raise refusal(model, f"`{name}` and `{other}` share a weight")
    for embedding in structure.embeddings:
        if embedding.weight.shape[1] != structure.width:
            raise refusal(model, f"an embedding has {embedding.weight.shape[1]} channels, not {structure.width}")
    if not structure.outer_norms or not all(structure.blocks.values()):
        raise refusal(model, "it has a block without layers, or no norm before the head")


@torch.no_grad()
def check_rotation(model: nn.Module, structure: Structure) -> None:
    """Raise UserError if the stream cannot be rotated.

    Every norm must be a gain after a function that turns with its input (RMS norm), and be read by linear layers only.
    """
    fix = "Set basis.rotation_steps: 0; its channels can be reordered."
    read = {id(unit.norm) for unit in structure.units}
    kind = type(model).__name__
    for norm in structure.norms:
        outer = any(norm is each for each in structure.outer_norms)
        if (not outer and id(norm) not in read) or len(structure.outer_norms) > 1:
            raise UserError(
                f"{kind} cannot be rotated: a {type(norm).__name__} acts on what is added to the residual stream, and "
                f"cannot be folded into a layer that reads it. {fix}",
                "basis.rotation_steps",
            )
        if not _turns_with_input(norm, structure.width):
            raise UserError(
                f"{kind} cannot be rotated: a {type(norm).__name__} is no RMS norm with a gain. {fix}",
                "basis.rotation_steps",
            )


def _turns_with_input(norm: Any, width: int) -> bool:
    """Whether `norm(x) = w · f(x)` and `f(x Q) = f(x) Q` for an orthogonal Q: a Householder reflection is tried."""
    if set(dict(norm.named_parameters(recurse=False))) != {"weight"}:
        return False
    weight = norm.weight
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(4, width, generator=generator).to(weight) for _ in range(2))
    x = x + 1  # a mean that LayerNorm would take away
    v = v[:1] / v[:1].norm()
    gain = weight.data
    expected = norm(x)
    try:
        weight.data = torch.ones_like(gain)
        plain, turned = norm(x), norm(x - 2 * (x @ v.T) @ v)
    finally:
        weight.data = gain
    wanted = plain - 2 * (plain @ v.T) @ v
    return bool(torch.allclose(plain * gain, expected, atol=_CLOSE) and torch.allclose(turned, wanted, atol=_CLOSE))
