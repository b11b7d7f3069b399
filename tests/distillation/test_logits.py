import pytest
import torch

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation.logits import distillation_loss
from tests.distillation.plain_losses import CONFIGS, plain_loss


def batch(dtype: torch.dtype, tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = (2 * torch.randn(2, tokens, 13, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    teacher = (2 * torch.randn(2, tokens, 13, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, 13, (2, tokens), generator=generator)
    labels[0, 3] = labels[1, -1] = -100
    return student, teacher, labels


@pytest.mark.parametrize("config", CONFIGS)
def test_loss_and_gradient_equal_the_plain_formula_in_float64(config: DistillationConfig | None) -> None:
    student, teacher, labels = batch(torch.float64)
    loss, tokens = distillation_loss(student, teacher, labels, config)
    (ours,) = torch.autograd.grad(3 * loss, student)
    expected = plain_loss(student, teacher, labels, config)
    (theirs,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert tokens == 16


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_logits_are_summed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    config = DistillationConfig(ce_weight=1.0, kl_weight=0.5, temperature=2.0)
    student, teacher, labels = batch(dtype)
    loss, _ = distillation_loss(student, teacher, labels, config)
    expected = plain_loss(student.double(), teacher.double(), labels, config)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad(loss, student)
    (theirs,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_more_tokens_than_a_chunk_give_the_same_loss() -> None:
    student, teacher, labels = batch(torch.float64, tokens=300)
    config = DistillationConfig(alpha=0.67)
    loss, tokens = distillation_loss(student, teacher, labels, config)
    parts = [
        distillation_loss(student[:, rows], teacher[:, rows], labels[:, rows], config)
        for rows in (slice(0, 100), slice(100, 300))
    ]
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0])
    assert tokens == parts[0][1] + parts[1][1]


def test_ignored_positions_have_no_gradient() -> None:
    student, teacher, labels = batch(torch.float64)
    loss, _ = distillation_loss(student, teacher, labels, DistillationConfig(alpha=0.5))
    (grad,) = torch.autograd.grad(loss, student)
    assert not grad[labels == -100].any()
    assert grad[labels != -100].any(-1).all()


def test_infinite_logits_at_ignored_positions_do_not_spoil_the_sum() -> None:
    student, teacher, labels = batch(torch.float64)
    with torch.no_grad():
        student[labels == -100] = float("inf")
    loss, _ = distillation_loss(student, teacher, labels, DistillationConfig(alpha=0.5))
    (grad,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()


def test_equal_models_have_no_kl() -> None:
    student, _, labels = batch(torch.float64)
    loss, _ = distillation_loss(student, student.detach(), labels, DistillationConfig(alpha=1.0))
    assert abs(loss.item()) < 1e-12


def test_soft_cross_entropy_is_the_kl_plus_the_entropy_of_the_teacher() -> None:
    student, teacher, labels = batch(torch.float64)
    weights = dict(ce_weight=0.0, kl_weight=1.0, temperature=2.0)
    soft, _ = distillation_loss(student, teacher, labels, DistillationConfig(kind="tinybert", **weights))
    kl, _ = distillation_loss(student, teacher, labels, DistillationConfig(**weights))
    entropy = torch.distributions.Categorical(logits=teacher[labels != -100] / 2).entropy().sum()
    torch.testing.assert_close(soft, kl / 4 + entropy)
    (soft_grad,), (kl_grad,) = (torch.autograd.grad(loss, student) for loss in (soft, kl))
    torch.testing.assert_close(soft_grad, kl_grad / 4)


def test_mobilebert_needs_no_logits_of_the_teacher() -> None:
    student, _, labels = batch(torch.float64)
    ours, _ = distillation_loss(student, None, labels, DistillationConfig(kind="mobilebert", alpha=0.4))
    cross_entropy, _ = distillation_loss(student, None, labels, None)
    torch.testing.assert_close(ours, 0.6 * cross_entropy)


def test_alpha_is_shorthand_for_both_weights() -> None:
    assert DistillationConfig(alpha=0.25).weights == (0.75, 0.25)
    assert DistillationConfig(ce_weight=1.0, kl_weight=0.5).weights == (1.0, 0.5)
    assert not DistillationConfig(alpha=0).needs_teacher


def test_shapes_that_do_not_fit_are_refused() -> None:
    student, teacher, labels = batch(torch.float32)
    with pytest.raises(ValueError, match="labels"):
        distillation_loss(student, teacher, labels[:, 1:], None)
    with pytest.raises(ValueError, match="teacher logits"):
        distillation_loss(student, teacher[:, 1:], labels, DistillationConfig())
    with pytest.raises(ValueError, match="needs teacher logits"):
        distillation_loss(student, None, labels, DistillationConfig())
