"""Round the pruned layers of a model, and their SLoRB, to few bits: by AWQ, or without text to the nearest step."""

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ast_sparse.errors import UserError
from ast_sparse.export.awq.folds import SLORB_S, SLORB_X, Fold, find_groups, multiply_columns
from ast_sparse.export.codec import Codec
from ast_sparse.progress import progress_bar
from ast_sparse.sparsity.layers import group_dim_of, out_by_in
from ast_sparse.sparsity.model import densify_model
from ast_sparse.sparsity.oneshot import inverse_factor
from ast_sparse.sparsity.select import Prunable, decoder_blocks
from ast_sparse.sparsity.statistics import InputStatistics, calibrate_blocks
from ast_sparse.storage.files import SlorbPairs
from ast_sparse.tables import layer_kind

_ALPHAS = tuple(step / 10 for step in range(11))
_DAMPING = 0.01  # as SparseGPT's default
_FLOOR = 1e-4  # smallest root mean square of a column, as a share of the largest

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Rounded:
    """What was done to a model, whose pruned layers are now on the grid of a codec.

    Attributes:
        bits: of a value.
        scales: by layer, the scales of its groups `[out, ceil(in/scale_columns)]`.
        slorb: the pairs, scaled as their layers and rounded.
        errors: by layer, the relative squared error of its output on the calibration text; empty without text.
        unscaled: layers that got no AWQ scale, because nothing in their block can take it back.
        unseen: layers that no token of the text reached, rounded to the nearest step.
        sequences: number of calibration sequences; 0 without text.
        seq_len: tokens in each of them.
    """

    bits: int
    scales: dict[str, Tensor] = field(default_factory=dict)
    slorb: SlorbPairs = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unscaled: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    sequences: int = 0
    seq_len: int = 0

    def record(self) -> dict[str, Any]:
        """What was done, for `sparsity_config.json`."""
        if not self.sequences:
            return {"method": "nearest", "bits": self.bits}
        return {"method": "awq", "bits": self.bits, "sequences": self.sequences, "seq_len": self.seq_len}

    def lines(self) -> list[str]:
        """What was done, for the user."""
        if not self.sequences:
            return ["rounded to the nearest step, without calibration text"]
        error = sum(self.errors.values()) / max(len(self.errors), 1)
        scaled = len(self.scales) - len(self.unscaled) - len(self.unseen)
        lines = [
            f"AWQ on {self.sequences} sequences: relative squared error of a layer's output {error:.4f} on average, "
            f"{scaled} of {len(self.scales)} layers scaled"
        ]
        reasons = {"nothing before it takes it back": self.unscaled, "no token of the text reached it": self.unseen}
        for reason, names in reasons.items():
            for kind, count in Counter(map(layer_kind, names)).items():
                lines.append(f"  no scale: {kind} ({count}): {reason}")
        return lines


@torch.no_grad()
def round_copy(
    model: PreTrainedModel,
    layers: Collection[str],
    slorb: SlorbPairs,
    dtypes: Mapping[str, torch.dtype],
    dtype: torch.dtype,
    samples: Tensor | None,
    device: torch.device | None,
    progress: bool,
    in_place: bool,
    codec: Codec,
) -> tuple[dict[str, Tensor], Rounded]:
    """`round_model` on a plain float32 copy of a model, or on the model itself; returns the new weights too."""
    plain = (model if in_place else copy.deepcopy(model)).float().eval()
    densify_model(plain)
    chosen: dict[str, Any] = {name: plain.get_submodule(name) for name in layers}
    rounded = round_model(plain, chosen, slorb, dtypes, dtype, samples, codec, device, progress)
    return {name: value.detach() for name, value in plain.state_dict().items()}, rounded


@dataclass(frozen=True)
class _Layer:
    """A pruned layer of the block at hand; `weight` is a view `[out, in]`."""

    name: str
    weight: Tensor
    dtype: torch.dtype
    statistics: InputStatistics | None
    codec: Codec

    @property
    def hessian(self) -> Tensor:
        assert self.statistics is not None and self.statistics.hessian is not None
        return self.statistics.hessian

    def round(self, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rounded weight, columns multiplied by an AWQ scale, and its scales; errors count as on the inputs."""
        weight = self.weight if scale is None else self.weight * scale
        return self.codec.rounded(weight, self.dtype, self.importance(scale))

    def importance(self, scale: Tensor | None) -> Tensor | None:
        """Mean squares `[in]` of the inputs divided by an AWQ scale; None without text."""
        if self.statistics is None or scale is None:
            return None if self.statistics is None else self.statistics.squares
        return self.statistics.squares / scale.square()

    def error(self, scale: Tensor | None = None) -> Tensor:
        """Squared error of the output on the calibration text after rounding, up to a factor."""
        rounded = self.round(scale)[0].float()
        return self.squared_error((rounded if scale is None else rounded / scale) - self.weight).sum()

    def squared_error(self, change: Tensor) -> Tensor:
        """Squared error `[out]` of the outputs on the calibration text after a change of the weight, up to a factor."""
        return ((change @ self.hessian) * change).sum(1)

    def rounded_with_feedback(self, factor: Tensor) -> tuple[Tensor, Tensor] | None:
        """The weight and its scales by `Codec.round_with_feedback`; None if the Hessian is not positive definite.

        Args:
            factor: `[in]`, what the inputs of the present weight are multiplied by.
        """
        assert self.codec.round_with_feedback is not None
        hessian = self.hessian * factor * factor[:, None]
        try:
            inverse = inverse_factor(hessian, hessian.diagonal() == 0, _DAMPING)
        except ValueError:
            return None
        return self.codec.round_with_feedback(self.weight, self.dtype, hessian.diagonal(), inverse)


@torch.no_grad()
def round_model(
    model: PreTrainedModel,
    layers: Mapping[str, Prunable],
    slorb: SlorbPairs,
    dtypes: Mapping[str, torch.dtype],
    dtype: torch.dtype,
    samples: Tensor | None,
    codec: Codec,
    device: torch.device | None = None,
    progress: bool = False,
) -> Rounded:
    """Round layers of a plain float32 model with masked weights in place; zeros stay zeros.

    With samples, columns get AWQ scales first, which change the norms and layers before them too: the unrounded model
    would compute the same as before. Each block is calibrated on the outputs of the rounded ones before it.

    Args:
        layers: the pruned layers by name.
        slorb: their SLoRB pairs.
        dtypes: of the written weights, by parameter name.
        dtype: of the written SLoRB pairs.
        samples: `[sequences, tokens]` int64; None: each weight is rounded to the nearest step.
        codec: what must be able to hold the weights.
        device: where the blocks run; default: where they are.

    Raises:
        UserError: the model cannot be calibrated block by block.
    """
    assert codec.value_bits is not None, "the codec holds any weight"
    done = Rounded(codec.value_bits)
    if samples is not None:
        done.sequences, done.seq_len = samples.shape

    def prepared(name: str, statistics: InputStatistics | None = None) -> _Layer:
        layer = layers[name]
        return _Layer(name, out_by_in(layer.weight, group_dim_of(layer)), dtypes[f"{name}.weight"], statistics, codec)

    with _with_slorb(model, slorb):
        if samples is None:
            for name in layers:
                _write(prepared(name), done)
        else:
            shared, attention = _shared(model), _attention(model)
            written = {module: dtypes.get(f"{name}.weight", dtype) for name, module in model.named_modules()}
            blocks, calls = decoder_blocks(model), dict[nn.Module, _Call]()
            seen = calibrate_blocks(model, blocks, layers, samples, True, device)
            with (
                _remembered(blocks, calls),
                progress_bar(total=len(blocks), desc="Rounding, AWQ", unit="block", disable=not progress) as bar,
            ):
                for (name, block), statistics in zip(blocks.items(), seen, strict=True):
                    inside = {layer: prepared(layer, found) for layer, found in statistics.items()}
                    _round_block(name, block, calls[block], inside, written, shared, attention, done)
                    bar.update()
        done.slorb = {name: _rounded_pair(model.get_submodule(name), dtype, codec) for name in slorb}
    return done


def _round_block(
    name: str,
    block: nn.Module,
    call: _Call,
    inside: Mapping[str, _Layer],
    written: Mapping[nn.Module, torch.dtype],
    shared: set[nn.Module],
    attention: tuple[int, int] | None,
    done: Rounded,
) -> None:
    """Scale the layers of a block where it can take the scale back, and round them."""

    def run() -> tuple[Tensor, Tensor]:
        args, kwargs = call
        output = block(*args, **kwargs)
        return args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple | list) else output

    for layer in inside.values():
        if layer.statistics is not None and not bool(layer.statistics.squares.isfinite().all()):
            raise UserError(f"`{layer.name}` gets inputs that are not finite. Check the model.")
    scales: dict[str, Tensor] = {}
    for group in find_groups(block, run, shared, written, attention):
        fitted = [inside[key] for each in group.layers if (key := f"{name}.{each}") in inside]
        fitted = [layer for layer in fitted if layer.statistics is not None]
        if not fitted or group.fold is None:
            continue
        scale = best_scale(fitted, group.fold)
        group.fold.divide(scale)
        for each in group.layers.values():
            multiply_columns(each, scale)
        scales |= dict.fromkeys((layer.name for layer in fitted), scale)
    done.unseen += [name for name, layer in inside.items() if layer.statistics is None]
    done.unscaled += [name for name, layer in inside.items() if layer.statistics is not None and name not in scales]
    for layer in inside.values():
        _write(layer, done, scales.get(layer.name))


def best_scale(layers: list[_Layer], fold: Fold) -> Tensor:
    """The AWQ scale `[in]` with the least error of the outputs of the rounded layers: ones, or a power of the inputs.

    The power of the root mean square of each column is searched from 0 to 1.
    """
    squares = layers[0].hessian.diagonal()
    rms = fold.tie(squares).sqrt()
    best = torch.ones_like(rms)
    if not bool(rms.any()):
        return best
    logarithm = rms.clamp(min=_FLOOR * float(rms.max())).log()
    logarithm -= logarithm.mean()
    lowest = None
    for alpha in _ALPHAS:
        scale = fold.exact((alpha * logarithm).exp()) if alpha else best
        error = float(sum(layer.error(scale) for layer in layers))
        if lowest is None or error < lowest:
            best, lowest = scale, error
    return best


def _write(layer: _Layer, done: Rounded, scale: Tensor | None = None) -> None:
    """Round a layer whose columns were already multiplied by `scale`, in place."""
    rounded, scales = layer.codec.rounded(layer.weight, layer.dtype, layer.importance(scale))
    if layer.statistics is not None:
        factor = torch.ones_like(layer.statistics.squares) if scale is None else 1 / scale
        weight = layer.weight * factor
        error = layer.squared_error(rounded * factor - weight)
        other = layer.rounded_with_feedback(factor)
        if other is not None:  # each row as it is better
            found = layer.squared_error(other[0] * factor - weight)
            better, error = (found < error)[:, None], torch.minimum(error, found)
            rounded, scales = (torch.where(better, *pair) for pair in zip(other, (rounded, scales), strict=True))
        whole = layer.squared_error(weight).sum().clamp(min=torch.finfo(torch.float32).tiny)
        done.errors[layer.name] = float(error.sum() / whole)
    layer.weight.copy_(rounded)
    done.scales[layer.name] = scales.cpu()


def _rounded_pair(layer: nn.Module, dtype: torch.dtype, codec: Codec) -> tuple[Tensor, Tensor]:
    s, x = (codec.rounded(layer.get_buffer(key), dtype)[0].cpu() for key in (SLORB_S, SLORB_X))
    return s, x


@contextmanager
def _with_slorb(model: nn.Module, slorb: SlorbPairs) -> Iterator[None]:
    """Let layers compute with their SLoRB pairs, which are buffers of them for the time being."""

    def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(args[0], layer.get_buffer(SLORB_X)), layer.get_buffer(SLORB_S))

    handles = []
    for name, (s, x) in slorb.items():
        layer = model.get_submodule(name)
        for key, tensor in ((SLORB_S, s), (SLORB_X, x)):
            layer.register_buffer(key, tensor.detach().float().clone(), persistent=False)
        handles.append(layer.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in slorb:
            for key in (SLORB_S, SLORB_X):
                del model.get_submodule(name)._buffers[key]


@contextmanager
def _remembered(blocks: Mapping[str, nn.Module], calls: dict[nn.Module, _Call]) -> Iterator[None]:
    """Keep the arguments of the last call of a block."""

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.clear()  # those of earlier blocks take memory
        calls[module] = args, kwargs

    handles = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in blocks.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shared(model: nn.Module) -> set[nn.Module]:
    """Modules that have a parameter of another one, or stand at two places."""
    places: dict[int, list[nn.Module]] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(module)
    return {module for modules in places.values() if len(modules) > 1 for module in modules}


def _attention(model: PreTrainedModel) -> tuple[int, int] | None:
    """Number of key-value heads and size of a head, as the configuration says; folds are tried before they are used."""
    config: Any = model.config.get_text_config(decoder=True)
    try:
        heads, width = (getattr(config, key, None) for key in ("num_attention_heads", "hidden_size"))
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or (width // heads if heads and width else None)
    except RuntimeError:  # transformers says so if they differ by layer (Gemma 4)
        return None
    return (kv_heads, size) if isinstance(kv_heads, int) and isinstance(size, int) else None
