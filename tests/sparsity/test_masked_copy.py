"""The 16-bit copy of a masked weight is never stale, never saved, and changes no bit of a result."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ast_sparse import SparsityConfig
from ast_sparse.optim import SparseAdamW
from ast_sparse.sparsity import masked_copy
from ast_sparse.sparsity.layers import SparseLayer, make_dense, make_sparse, share_mask
from ast_sparse.sparsity.masked_copy import MaskedCopy
from ast_sparse.sparsity.masks import Pattern, nm_mask
from ast_sparse.sparsity.model import (
    masks_by_parameter,
    refresh_masks,
    sparse_layers,
    sparsify_model,
    use_masked_weights,
)
from ast_sparse.sparsity.offload import OffloadedAdamW
from tests.kernels.gpu.cpu_cusparselt import cpu_cusparselt
from tests.models import tiny_model

BF16 = torch.bfloat16


def layer_with_copy(fixed: bool = False, family: str = "linear") -> SparseLayer:
    torch.manual_seed(0)
    dense = nn.Linear(16, 8) if family == "linear" else Conv1D(8, 16)
    dim = 1 if family == "linear" else 0
    mask = nm_mask(dense.weight.abs().movedim(dim, -1)).movedim(-1, dim)
    layer = make_sparse(dense, mask, Pattern(2, 4), fixed)
    use_masked_weights(layer, "kept")
    return layer.train()


def output(layer: nn.Module) -> Tensor:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", BF16):
        return layer(x)


def assert_is_fresh(layer: SparseLayer) -> None:
    """The product is the one that a layer without a copy has now, to the bit."""
    found, layers_copy = output(layer), layer.masked_copy
    layer.masked_copy = None
    assert torch.equal(found, output(layer))
    layer.masked_copy = layers_copy


@contextmanager
def counted_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    written: list[torch.Size] = []
    own = masked_copy.masked_as
    with monkeypatch.context() as patch:
        patch.setattr(masked_copy, "masked_as", lambda w, m, d: written.append(w.shape) or own(w, m, d))
        yield written


@pytest.mark.parametrize("family", ["linear", "conv1d"])
@pytest.mark.parametrize("fixed", [False, True])
def test_results_and_gradients_are_equal_to_the_bit_and_nothing_is_made_again(
    family: str, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_with_copy(fixed, family)
    x, outside = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 8).to(BF16)
    inputs = [x, layer.weight, layer.bias]

    def results() -> list[Tensor]:
        with torch.autocast("cpu", BF16):
            result = layer(x)
        return [result, *torch.autograd.grad(result, inputs, outside)]

    with counted_writes(monkeypatch) as written:
        monkeypatch.setattr("ast_sparse.sparsity.layers.masked_as", None)  # neither pass masks a weight by itself
        found, again = results(), results()
        assert len(written) == 1
        monkeypatch.undo()
    use_masked_weights(layer, "made")
    for pair in (*zip(found, results(), strict=True), *zip(found, again, strict=True)):
        assert pair[0].dtype == pair[1].dtype and torch.equal(*pair)


def step_of(optimizer: torch.optim.Optimizer, layer: SparseLayer) -> None:
    layer.weight.grad = torch.ones(layer.weight.shape)  # float32 also if it is offloaded
    optimizer.step()


def by_sparse_adamw(layer: SparseLayer) -> None:
    optimizer = SparseAdamW([layer.weight], lr=0.1, mask_decay=0.1)
    optimizer.bind_masks({layer.weight: layer.mask})
    step_of(optimizer, layer)


def by_an_optimizer_that_writes_to_data(layer: SparseLayer) -> None:
    class Old(torch.optim.Optimizer):
        def step(self, closure: object = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(1.0)

    step_of(Old([layer.weight], {}), layer)


def by_an_offloaded_run(layer: SparseLayer) -> None:
    optimizer = OffloadedAdamW([{"params": [layer.weight], "is_masked": True}], lr=0.1, half=BF16)
    optimizer.bind_masks({layer.weight: layer.mask})
    optimizer.begin_offload(layer)
    assert_is_fresh(layer)
    step_of(optimizer, layer)
    assert_is_fresh(layer)
    with optimizer.true_weights():
        refresh_masks(layer)
        assert_is_fresh(layer)
    assert_is_fresh(layer)
    optimizer.end_offload()


def by_a_refresh(layer: SparseLayer) -> None:
    layer.weight.data = layer.weight.data.roll(1, 1)
    output(layer)
    refresh_masks(layer)


def by_loading(layer: SparseLayer) -> None:
    layer.load_state_dict({name: tensor.flip(0) for name, tensor in layer.state_dict().items()})


def by_loading_with_assign(layer: SparseLayer) -> None:
    layer.load_state_dict({name: tensor.flip(0) for name, tensor in layer.state_dict().items()}, assign=True)


def by_evaluating_other_weights(layer: SparseLayer) -> None:
    """As a moving average of weights does, which writes to `.data`: no version counter sees it."""
    own = layer.weight.detach().clone()
    layer.eval()
    layer.weight.data.mul_(2)
    assert_is_fresh(layer)
    layer.weight.data.copy_(own - 1)
    layer.train()


def by_data_of_the_same_address(layer: SparseLayer) -> None:
    """A new storage at the address of the old one: the version counter stays, too."""
    values = layer.weight.detach().numpy().copy()
    for _ in range(2):
        values += 1
        layer.weight.data = torch.from_numpy(values)
        assert_is_fresh(layer)


def by_going_to_another_dtype(layer: SparseLayer) -> None:
    layer.to(torch.float64)
    layer.weight.data.mul_(1 + 2**-30)
    layer.to(torch.float32)
    layer.weight.data.mul_(3)


def by_many_at_once(layer: SparseLayer) -> None:
    torch._foreach_mul_([layer.weight.detach()], 2.0)


CHANGES: list[Callable[[SparseLayer], object]] = [
    by_sparse_adamw,
    by_an_optimizer_that_writes_to_data,
    by_an_offloaded_run,
    by_a_refresh,
    by_loading,
    by_loading_with_assign,
    by_evaluating_other_weights,
    by_data_of_the_same_address,
    by_going_to_another_dtype,
    by_many_at_once,
    lambda layer: step_of(torch.optim.AdamW([layer.weight], foreach=True), layer),
    lambda layer: step_of(torch.optim.AdamW([layer.weight], fused=True), layer),
    lambda layer: layer.weight.detach().mul_(2),
    lambda layer: layer.mask.detach().copy_(~layer.mask),
    lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(8, 16))),
    lambda layer: setattr(layer, "mask", nn.Parameter(~layer.mask.detach(), requires_grad=False)),
    lambda layer: setattr(layer.weight, "data", layer.weight.detach() + 1),
    lambda layer: setattr(layer.mask, "data", ~layer.mask.detach()),
    lambda layer: nn.init.normal_(layer.weight),
]


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_of_weight_or_mask_leaves_a_stale_copy(change: Callable[[SparseLayer], object]) -> None:
    layer = layer_with_copy()
    before = output(layer)
    change(layer)
    assert_is_fresh(layer)
    assert not torch.equal(before, output(layer))


def test_a_write_that_nothing_shows_is_seen_after_forget() -> None:
    """Between the micro-batches of a step, through `.data`: what the module's first lines say."""
    layer = layer_with_copy()
    before = output(layer)
    layer.weight.data.mul_(2)
    assert torch.equal(output(layer), before) and isinstance(layer.masked_copy, MaskedCopy)
    layer.masked_copy.forget()
    assert_is_fresh(layer)


def test_the_copy_of_a_forward_pass_is_that_of_its_backward_pass() -> None:
    """A copy that was written again is another tensor; a changed weight is an error, as it is without copies."""
    layer = layer_with_copy()
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", BF16):
        first = layer(x)
    expected = torch.autograd.grad(first.sum(), x, retain_graph=True)[0]
    assert layer.masked_copy is not None
    layer.masked_copy.forget()
    output(layer)
    assert torch.equal(torch.autograd.grad(first.sum(), x, retain_graph=True)[0], expected)
    layer.weight.detach().mul_(2)
    output(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


@pytest.mark.parametrize(
    "case", ["float32", "evaluation", "float64 input", "inference mode", "offloaded", "compiling", "masked by FSDP2"]
)
def test_where_no_copy_belongs_there_is_none(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_with_copy(), torch.randn(4, 16)
    layer.train(case != "evaluation")
    layer.is_offloaded, layer.gathered_masked = case == "offloaded", case == "masked by FSDP2"
    layer.device_mask = layer.mask.detach() if case == "offloaded" else None
    if case == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if case == "float64 input":
        layer.to(torch.float64)
    with torch.autocast("cpu", BF16, enabled=case != "float32"), torch.inference_mode(case == "inference mode"):
        layer(x.double() if case == "float64 input" else x)
    assert layer.masked_copy is not None and layer.masked_copy.nbytes == 0
    with torch.autocast("cpu", torch.float16):
        assert layer_with_copy()(x).dtype == torch.float16


def test_layers_that_share_a_weight_share_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, twin = layer_with_copy(), nn.Linear(16, 8)
    twin.weight = layer.weight
    share_mask(twin, layer)
    both = nn.ModuleList([layer, twin])
    use_masked_weights(both, "kept")
    with counted_writes(monkeypatch) as written:
        output(layer)
        output(twin)
        assert len(written) == 1
    layer.weight.detach().mul_(2)
    assert isinstance(twin, SparseLayer)
    for each in (layer, twin):
        assert_is_fresh(each)


def test_copies_are_written_once_a_step_and_stay_out_of_everything_that_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The model is wrapped by DDP; its blocks run again in the backward pass."""
    model = tiny_model("llama")
    sparsify_model(model, SparsityConfig())
    names = [list(each) for each in (model.state_dict(), dict(model.named_buffers()))]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    use_masked_weights(model, "kept")
    layers = sparse_layers(model)
    optimizer = SparseAdamW([{"params": list(masks_by_parameter(model)), "is_masked": True}], lr=0.01)
    optimizer.bind_masks(masks_by_parameter(model))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model).train()
        ids = torch.randint(0, 100, (2, 8))
        with counted_writes(monkeypatch) as written:
            for _ in range(2):
                for _ in range(2):
                    with torch.autocast("cpu", BF16):
                        wrapped(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
            assert len(written) == 2 * len(layers)
    finally:
        torch.distributed.destroy_process_group()
    sizes = [copy_of(layer).nbytes for layer in layers.values()]
    assert sizes == [2 * layer.weight.numel() for layer in layers.values()]
    assert names == [list(each) for each in (model.state_dict(), dict(model.named_buffers()))]
    copied = list(sparse_layers(copy.deepcopy(model)).values())
    for layer in (*copied, *pickle.loads(pickle.dumps(list(layers.values())))):
        assert copy_of(layer).nbytes == 0
    some = next(iter(layers.values()))
    some.graph_copy = torch.zeros(())
    make_dense(some)
    assert not {"masked_copy", "graph_copy"} & set(vars(some))
    use_masked_weights(model, "made")
    assert all(layer.masked_copy is None for layer in sparse_layers(model).values())


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(2, 4, structured=False)], ids=str)
@pytest.mark.parametrize("family", ["linear", "conv1d"])
def test_forward_products_of_2_4_weights_may_be_semi_structured(
    family: str, pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 32) if family == "linear" else Conv1D(32, 64)
    dim = 1 if family == "linear" else 0
    mask = nm_mask(dense.weight.abs().movedim(dim, -1), 1 if pattern.n == 1 else 2).movedim(-1, dim)
    layer = make_sparse(dense, mask, pattern).train()
    x, found = torch.randn(2, 5, 64).requires_grad_(), []
    with cpu_cusparselt(monkeypatch) as calls:
        for semi_structured in (False, True):
            use_masked_weights(layer, "kept", semi_structured)
            x.grad = layer.weight.grad = layer.bias.grad = None
            with torch.autocast("cpu", BF16):
                (layer(x) + layer(x)).sum().backward()
            found.append([layer(x), x.grad, layer.weight.grad, layer.bias.grad])  # without autocast it is dense
        fits = pattern == Pattern(2, 4)
        assert calls.compressed == [(32, 64)] * fits and calls.multiplied == [(16, 64)] * 2 * fits
        assert copy_of(layer).nbytes == 32 * 64 * (2 + 1.125 * fits)
        for before, after in zip(*found, strict=True):
            torch.testing.assert_close(after, before)
        with torch.autocast("cpu", BF16):
            layer.eval()(x)
            copy.deepcopy(layer).train()(x)  # a copy of the layer does as the layer does
    assert len(calls.compressed) == 2 * fits and len(calls.multiplied) == 3 * fits


def copy_of(layer: SparseLayer) -> MaskedCopy:
    assert layer.masked_copy is not None
    return layer.masked_copy


def test_leaving_training_mode_or_the_device_frees_the_copy_and_staying_there_does_not() -> None:
    layer = layer_with_copy()
    output(layer)
    layer.train()
    assert copy_of(layer).nbytes == 2 * 8 * 16
    layer.eval()
    assert copy_of(layer).nbytes == 0
    output(layer.train())
    layer.to("cpu")  # to another device in general
    assert copy_of(layer).nbytes == 0
