import pytest
import torch

from ast_sparse.kernels.nm_masks import magnitude_mask, nm_group_mask
from tests.sparsity.slow_masks import slow_mask


@pytest.mark.parametrize(("n", "m", "dim"), [(2, 4, 0), (2, 4, 1), (1, 2, 1), (4, 8, 1)])
def test_compiled_masks_are_the_eager_ones_and_those_of_sorting_to_the_bit(n: int, m: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(m)
    signs = torch.randint(-3, 4, (3 * m, 5 * m), generator=generator).float()  # many ties, zeros of both signs
    signs[:, 1] = -signs[:, 0]
    signs[0, 2], signs[1, 1] = torch.inf, -torch.inf
    fresh = torch.randn(7 * m, m, generator=generator)
    for weight in (signs, -0.0 * signs.nan_to_num(), fresh, fresh.t()[:, : 2 * m]):  # the last one is not contiguous
        masks = [magnitude_mask(weight, n, m, dim, kernels) for kernels in ("eager", "compiled")]
        twin = slow_mask(weight.abs() if dim else weight.abs().t(), n, m)
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], twin if dim else twin.t())


def test_no_weights_have_an_empty_mask() -> None:
    for kernels in ("eager", "compiled"):  # a process that FSDP2 left without rows
        assert magnitude_mask(torch.empty(0, 8), 2, 4, 1, kernels).shape == (0, 8)


def test_eager_blocks_equal_one_mask_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ast_sparse.kernels.nm_masks._BLOCK", 64)
    scores = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nm_group_mask(scores, 2, 4), slow_mask(scores, 2, 4))
    assert torch.equal(nm_group_mask(scores, 4, 8, 0), slow_mask(scores.t(), 4, 8).t())


def test_on_the_meta_device_a_mask_has_only_its_shape() -> None:
    mask = nm_group_mask(torch.empty(8, 12, device="meta"), 2, 4)
    assert mask.is_meta and mask.shape == (8, 12) and mask.dtype == torch.bool
