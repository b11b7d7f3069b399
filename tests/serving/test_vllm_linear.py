"""A layer of vLLM on every tensor-parallel rank, against the dense product in float64."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ast_sparse import nm_mask, pack24
from ast_sparse.errors import UserError
from ast_sparse.export.codec import Codec
from ast_sparse.export.codec24 import CODE24
from ast_sparse.export.codec24_int4 import CODE24_INT4
from ast_sparse.kernels.int4 import round_to_grid
from ast_sparse.serving.slorb_serving import SlorbFiles
from ast_sparse.storage.slorb_adapter import write_adapter
from tests.serving.vllm_stand_in import Layer

INPUTS = 48
PARTS = {"q": 32, "k": 16, "v": 16}


def weight(rows: int, seed: int, inputs: int = INPUTS) -> Tensor:
    found = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    return found * nm_mask(found.abs())


def pair(rows: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator), torch.randn(rank, INPUTS, generator=generator)


def method(parts: list[str], slorb: SlorbFiles | None = None, codec: Codec = CODE24) -> Any:
    from ast_sparse.serving.vllm_linear import Vllm24LinearMethod

    config = SimpleNamespace(slorb=slorb, check_all_built=lambda: None, codec=codec)
    return Vllm24LinearMethod(config, parts)  # type: ignore[arg-type]


def filled(layer: Layer, weights: dict[Any, Tensor]) -> Layer:
    codec = layer.method.config.codec
    for part, dense in weights.items():
        rounded = (dense,) if codec.round is None else codec.round(dense)
        for name, tensor in zip(codec.names, codec.encode(rounded[0], None, *rounded[1:]), strict=True):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, part)
    layer.method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("with_slorb", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_merged_rows_of_all_ranks_are_the_dense_product(
    vllm: None, ranks: int, with_slorb: bool, tmp_path: Path
) -> None:
    """Two groups of heads: with four ranks, two of them hold the same keys and values."""
    weights = {part: weight(rows, seed) for seed, (part, rows) in enumerate(PARTS.items())}
    pairs = {"q": pair(32, 6, 1), "v": pair(16, 3, 2)} if with_slorb else {}
    slorb = adapter(tmp_path, pairs)
    x = torch.randn(5, INPUTS)
    outputs: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for rank in range(ranks):
        layer = filled(Layer(method(list("qkv"), slorb), [*PARTS.values()], INPUTS, rank, ranks, groups=2), weights)
        for part, y in zip(PARTS, layer.method.apply(layer, x).split(layer.sizes, -1), strict=True):
            if part == "q" or rank % layer.num_kv_head_replicas == 0:
                outputs[part].append(y)
    for part, found in outputs.items():
        assert_product(torch.cat(found, -1), x, weights[part], pairs.get(part))


@pytest.mark.parametrize("with_slorb", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_split_inputs_of_all_ranks_sum_to_the_dense_product(
    vllm: None, ranks: int, with_slorb: bool, tmp_path: Path
) -> None:
    dense, bias, x = weight(32, 0), torch.randn(32), torch.randn(2, 3, INPUTS)
    pairs = {"down": pair(32, 6, 1)} if with_slorb else {}
    slorb = adapter(tmp_path, pairs)
    total = torch.zeros(2, 3, 32)
    for rank in range(ranks):
        layer = filled(Layer(method(["down"], slorb), [32], INPUTS, rank, ranks, by_input=True), {None: dense})
        total += layer.method.apply(layer, x.chunk(ranks, -1)[rank], bias if rank == 0 else None)
    assert_product(total, x, dense, pairs.get("down"), bias)


@pytest.mark.parametrize("ranks", [1, 2])
def test_values_of_4_bits_on_all_ranks_are_the_product_with_the_rounded_weight(
    vllm: None, ranks: int, tmp_path: Path
) -> None:
    x = torch.randn(5, 256)
    parts = {part: weight(rows, seed, 256) for seed, (part, rows) in enumerate(PARTS.items())}
    found = []
    for rank in range(ranks):
        layer = filled(
            Layer(method(list("qkv"), codec=CODE24_INT4), [*PARTS.values()], 256, rank, ranks, groups=2), parts
        )
        assert sum(each.nbytes for each in layer.parameters()) == 64 // ranks * (256 // 4 + 256 // 8 + 2 * 4)
        found.append(layer.method.apply(layer, x).split(layer.sizes, -1))
    for index, dense in enumerate(parts.values()):
        assert_product(torch.cat([each[index] for each in found], -1), x, round_to_grid(dense)[0])
    s, x_pair = torch.randn(32, 6), torch.randn(6, 256)
    slorb, total = adapter(tmp_path, {"down": (s, x_pair)}), torch.zeros(5, 32)
    for rank in range(ranks):
        layer = Layer(method(["down"], slorb, CODE24_INT4), [32], 256, rank, ranks, by_input=True)
        layer = filled(layer, {None: parts["q"]})
        total += layer.method.apply(layer, x.chunk(ranks, -1)[rank])
    assert_product(total, x, round_to_grid(parts["q"])[0], (s, x_pair))


def test_a_rank_that_would_cut_a_group_with_one_scale_is_refused_and_missing_scales_are_found(vllm: None) -> None:
    with pytest.raises(UserError, match=r"`down`: 384 inputs on 2 tensor-parallel ranks are not multiples of 128"):
        Layer(method(["down"], codec=CODE24_INT4), [32], 384, 0, 2, by_input=True)
    layer = Layer(method(["up"], codec=CODE24_INT4), [32], INPUTS)  # uncut, any multiple of 8
    rounded, scale = round_to_grid(weight(32, 0))
    values, meta, _ = CODE24_INT4.encode(rounded, None, scale)
    layer.load(layer.weight, values)
    layer.load(layer.weight_meta, meta)
    with pytest.raises(UserError, match=r"`up`: values are missing, or not finite in torch\.float32\. Copy or export"):
        layer.method.process_weights_after_loading(layer)


def test_values_of_4_bits_that_no_file_held_are_found_for_each_part(vllm: None) -> None:
    """They begin as 0, which is a value as any other: the scales tell."""
    parts = {"q": weight(32, 0), "k": weight(16, 1), "v": torch.zeros(16, INPUTS)}  # a layer of zeros is no mistake
    for lacking in ("q", "k", None):
        layer = Layer(method(list("qkv"), codec=CODE24_INT4), [*PARTS.values()], INPUTS, groups=2)
        for part, dense in parts.items():
            rounded, scale = round_to_grid(dense)
            for name, tensor in zip(CODE24_INT4.names, CODE24_INT4.encode(rounded, None, scale), strict=True):
                if (part, name) != (lacking, "weight"):
                    layer.load(getattr(layer, name), tensor, part)
        if lacking is None:
            layer.method.process_weights_after_loading(layer)
            continue
        with pytest.raises(UserError, match="`q`: values are missing"):
            layer.method.process_weights_after_loading(layer)


def test_it_stays_compressed_in_memory(vllm: None) -> None:
    layer = filled(Layer(method(["up"]), [32], INPUTS), {None: weight(32, 0)})
    layer.bfloat16()
    stored = sum(parameter.nbytes for parameter in layer.parameters())
    assert stored == 0.5625 * 32 * INPUTS * 2
    assert {type(parameter) for parameter in layer.parameters()} == {torch.nn.Parameter}


def test_a_rank_that_would_cut_a_byte_of_positions_is_refused(vllm: None) -> None:
    with pytest.raises(UserError, match=r"`down`: 48 inputs on 4 tensor-parallel ranks are not multiples of 8"):
        Layer(method(["down"]), [32], INPUTS, 0, 4, by_input=True)


def test_values_that_no_file_held_are_found(vllm: None) -> None:
    layer = Layer(method(["up"]), [32], INPUTS)
    layer.load(layer.weight_meta, pack24(weight(32, 0))[1])
    with pytest.raises(UserError, match="`up`: values are missing, or not finite"):
        layer.method.process_weights_after_loading(layer)


@pytest.mark.parametrize("damaged", [False, True])
def test_metadata_that_is_missing_or_damaged_is_found(vllm: None, damaged: bool) -> None:
    layer = Layer(method(["up"]), [32], INPUTS)
    values, meta = pack24(weight(32, 0))
    layer.load(layer.weight, values)
    if damaged:
        meta[3, 2] = 0x4F  # its first group keeps position 3 twice
        layer.load(layer.weight_meta, meta)
    with pytest.raises(UserError, match="`up`: its metadata names positions that no 2:4 group has"):
        layer.method.process_weights_after_loading(layer)


@pytest.mark.parametrize("codec", [CODE24, CODE24_INT4])
def test_a_layer_without_weights_takes_the_random_ones_of_vllm(vllm: None, codec: Codec) -> None:
    """`--load-format dummy` fills floating-point tensors, and others only with the value they ask for."""
    layer = Layer(method(["up"], codec=codec), [32], INPUTS)
    for name in codec.names:
        parameter = getattr(layer, name)
        if parameter.is_floating_point():
            parameter.data.uniform_(-1e-3, 1e-3)
        else:
            parameter.data.fill_(parameter.dummy_weight_value)
    layer.method.process_weights_after_loading(layer)
    assert layer.method.apply(layer, torch.randn(5, INPUTS)).isfinite().all()


def adapter(folder: Path, pairs: dict[str, tuple[Tensor, Tensor]]) -> SlorbFiles | None:
    if not pairs:
        return None
    write_adapter(folder / "slorb", "base", pairs)
    return SlorbFiles(folder / "slorb", pairs)


def assert_product(
    found: Tensor, x: Tensor, dense: Tensor, slorb: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None
) -> None:
    """`x Wᵀ + S(Xx) + b`, written out in float64, up to what float32 may lose: one rounding for each term of a sum."""

    def product(x: Tensor, dense: Tensor, s: Tensor, inner: Tensor, bias: Tensor) -> Tensor:
        return x @ dense.T + x @ inner.T @ s.T + bias

    rows, inputs = dense.shape
    s, inner = slorb or (torch.zeros(rows, 0), torch.zeros(0, inputs))
    terms = [each.double() for each in (x, dense, s, inner, torch.zeros(rows) if bias is None else bias)]
    allowed = (inputs + len(inner) + 2) * torch.finfo(torch.float32).eps * product(*(each.abs() for each in terms))
    assert bool(((found - product(*terms)).abs() <= allowed).all())
