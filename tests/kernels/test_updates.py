import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics

from ast_sparse.kernels.choice import Kernels
from ast_sparse.kernels.updates import PLACEMENTS, StepValues, update_weights


def twin(placement: str, w, g, mask, first, second, values: StepValues) -> list[torch.Tensor]:
    """(16)-(23) on whole tensors in float64, with no regard to speed."""
    w, g, first, second = (tensor.double() for tensor in (w, g, first, second))
    pruned = torch.where(mask, 0, w.sign() if values.is_l1 else w)
    if placement == "gradient":
        g = g + values.mask_decay * pruned
    first = values.beta1 * first + (1 - values.beta1) * g
    step = first + values.mask_decay * pruned if placement == "momentum" else first
    second = values.beta2 * second + (1 - values.beta2) * (step if placement == "momentum" else g).square()
    hat = (second / (1 - values.beta2**values.step)).sqrt() + values.eps
    new = w - values.lr * values.weight_decay * w - values.lr * step / ((1 - values.beta1**values.step) * hat)
    return [new - (values.lr * values.mask_decay * pruned if placement == "weight" else 0), first, second]


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_updates_equal_the_equations_in_float64(
    placement: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ast_sparse.kernels.updates._BLOCK", 100)  # several blocks, the last one short
    generator = torch.Generator().manual_seed(1)
    cases = [((13, 20), torch.float32, 2e-6), ((13, 20), torch.float64, 1e-13), ((7, 4), torch.bfloat16, 2e-2)]
    cases = cases if kernels == "eager" or placement == "momentum" else cases[:1]  # each dtype is compiled separately
    metrics.reset()
    graphs = counters["stats"]["unique_graphs"]
    for (rows, columns), dtype, tolerance in cases:
        for step, shape in ((1, (rows, columns)), (7, (rows + 3, columns))):
            w, g = torch.randn(2, *shape, generator=generator, dtype=dtype).unbind()
            first, second = torch.randn(2, *shape, generator=generator, dtype=dtype).mul_(0.1).unbind()
            second.square_()
            mask = torch.rand(shape, generator=generator) < 0.5
            values = StepValues(step, 0.01 * step, 0.9, 0.99, 1e-8, 0.1, 0.05 * (step - 1))
            expected = twin(placement, w, g, mask, first, second, values)
            before = g.clone(), mask.clone()
            update_weights(placement, w, g, mask, first, second, values, kernels)
            for got, wanted in zip((w, first, second), expected, strict=True):
                torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
            assert torch.equal(g, before[0]) and torch.equal(mask, before[1])
    graphs = counters["stats"]["unique_graphs"] - graphs
    assert metrics.generated_kernel_count == graphs  # an update is one kernel
    assert graphs <= len(cases)  # one for each dtype, none for new values of a step or another shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_decay_by_the_sign_equals_the_equations_in_float64(placement: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    w, g, first, second = torch.randn(4, 6, 8, generator=generator, dtype=dtype).unbind()
    second.square_()
    w[0, :2] = 0  # its sign is 0
    mask = torch.rand(6, 8, generator=generator) < 0.5
    values = StepValues(3, 0.01, 0.9, 0.99, 1e-8, 0.1, 0.05, is_l1=True)
    expected = twin(placement, w, g, mask, first, second, values)
    compiled = [tensor.clone() for tensor in (w, first, second)]
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    update_weights(placement, w, g, mask, first, second, values, "eager")
    torch.testing.assert_close([t.double() for t in (w, first, second)], expected, rtol=tolerance, atol=tolerance)
    if placement == "momentum" and dtype == torch.float32:  # one compilation; the rest of the update is the same
        update_weights(placement, compiled[0], g, mask, compiled[1], compiled[2], values, "compiled")
        torch.testing.assert_close([t.double() for t in compiled], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
def test_weights_in_any_layout_are_updated_in_place(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(2)
    w, g = torch.randn(2, 12, 8, generator=generator).unbind()
    mask = torch.rand(12, 8, generator=generator) < 0.5
    values = StepValues(1, 0.1, 0.9, 0.99, 1e-8, 0.1, 0.1)
    turned = w.t().contiguous().t()
    base, zeros = turned.t(), torch.zeros(4, 12, 8).unbind()
    update_weights("momentum", w, g, mask, zeros[0], zeros[1], values, kernels)
    update_weights("momentum", turned, g, mask, zeros[2], zeros[3], values, kernels)
    torch.testing.assert_close(turned, w)
    assert turned.t().data_ptr() == base.data_ptr() and not turned.is_contiguous()


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
def test_autograd_sees_that_a_weight_was_updated(kernels: Kernels) -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    version = weight._version
    values = StepValues(1, 0.1, 0.9, 0.99, 1e-8, 0.1, 0.1)
    moments = torch.zeros(2, 4, 4)
    update_weights("momentum", weight, torch.ones(4, 4), torch.ones(4, 4) > 0, *moments.unbind(), values, kernels)
    assert weight._version > version and (weight < 1).all()
