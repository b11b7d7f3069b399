"""Tests of the distillation loss in Triton's interpreter; `test_triton24.py` runs this file with TRITON_INTERPRET=1."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation import sliced
from ast_sparse.distillation.logits import distillation_loss
from ast_sparse.kernels.gpu import loss_rows
from tests.distillation.plain_losses import plain_loss
from tests.distillation.test_chunked import Case as HeadCase
from tests.distillation.test_chunked import check

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BLOCK = 256  # columns of a step here


@dataclass(frozen=True)
class Case:
    """A loss of three rows, the second of which is ignored."""

    kind: str = "kl"
    dtype: torch.dtype = FP32
    width: int = 500  # two steps, the second ragged
    teacher: int | None = 500
    ce_weight: float = 0.33
    kl_weight: float = 0.67
    temperature: float = 1.0
    softcap: float | None = None
    teacher_softcap: float | None = None
    scale: float = 1.0
    teacher_dtype: torch.dtype | None = None
    offset: float = 0.0  # of all logits

    @property
    def settings(self) -> dict[str, object]:
        names = ("kind", "ce_weight", "kl_weight", "temperature", "softcap", "teacher_softcap", "scale")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor]:
        generator = torch.Generator().manual_seed(self.width)
        # logits grow from column to column, differently in both models, so that each step has larger ones
        student = 3 * torch.randn(3, self.width, generator=generator) + self.offset
        student += torch.linspace(0, 9, self.width)
        teacher = None
        if self.teacher is not None:
            teacher = 3 * torch.randn(3, self.teacher, generator=generator) - self.offset
            teacher += torch.linspace(0, 5, self.teacher)
            teacher = teacher.to(self.teacher_dtype or self.dtype)
        common = min(self.width, self.teacher or self.width)
        labels = torch.tensor([common - 1, -100, common // 3])
        return student.to(self.dtype), teacher, labels


CASES = [
    Case(),
    Case(dtype=BF16, width=64, teacher=64),
    Case(dtype=FP16, temperature=2.0, scale=1024.0),
    Case(dtype=BF16, softcap=5.0, teacher_softcap=7.0),
    Case(softcap=30.0, temperature=0.5),
    Case(width=300, teacher=257),
    Case(width=257, teacher=300, temperature=3.0),
    Case(width=600, teacher=200, temperature=2.0),  # a whole step without a column of the teacher
    Case(ce_weight=0.0, kl_weight=1.0),
    Case(kl_weight=0.0, ce_weight=1.0),
    Case(teacher=None, ce_weight=1.0, dtype=BF16),
    Case(teacher=None, ce_weight=1.0, softcap=4.0),
    Case(teacher_dtype=BF16),
    Case("squarehead", temperature=2.0, ce_weight=0.5, kl_weight=2.0),
    Case("reverse_kl"),
    Case("reverse_kl", dtype=BF16, temperature=2.0, width=300, teacher=310),
    Case("reverse_kl", teacher_softcap=6.0, width=300, teacher=290, ce_weight=0.0),
    Case("tinybert", temperature=2.0),
    Case("tinybert", dtype=FP16, width=300, teacher=280, scale=512.0),
    Case("tinybert", softcap=8.0, width=1, teacher=1),
    Case(offset=1e4),
    Case("reverse_kl", offset=1e4, temperature=2.0),
    Case("tinybert", offset=1e4),
]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_rows, "_BLOCK", BLOCK)


def twin(case: Case, student: Tensor, teacher: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their sum in float64, by autograd through PyTorch's own losses."""
    products = student.double().requires_grad_()
    z = products if case.softcap is None else case.softcap * torch.tanh(products / case.softcap)
    losses = case.ce_weight * F.cross_entropy(z, labels, reduction="none")
    if teacher is not None:
        width, t = min(z.shape[1], teacher.shape[1]), case.temperature
        q = teacher.double()
        q = q if case.teacher_softcap is None else case.teacher_softcap * torch.tanh(q / case.teacher_softcap)
        log_s, log_t = F.log_softmax(z[:, :width] / t, 1), F.log_softmax(q[:, :width] / t, 1)
        if case.kind == "tinybert":
            soft = F.cross_entropy(z[:, :width] / t, log_t.exp(), reduction="none")
        elif case.kind == "reverse_kl":
            soft = t**2 * F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(1)
        else:
            soft = t**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
        losses = losses + case.kl_weight * soft
    losses = losses * (labels != -100)
    return losses.detach(), torch.autograd.grad(losses.sum(), products)[0]


def assert_close(case: Case, losses: Tensor, grads: Tensor, expected: Tensor, gradient: Tensor) -> None:
    """To 1e-6 of the largest entry, and the rounding of 16-bit gradients; the interpreter cuts bfloat16 off."""
    assert (losses.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
    info = torch.finfo(grads.dtype)
    rounding = info.smallest_normal if grads.dtype == FP32 else info.eps * (case.scale * gradient).abs() + info.tiny
    bound = 1e-6 * (case.scale * gradient).abs().amax(1, keepdim=True) + rounding
    assert ((grads.double() - case.scale * gradient).abs() <= bound).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_equal_autograd_in_float64(case: Case) -> None:
    student, teacher, labels = case.tensors()
    expected, gradient = twin(case, student, teacher, labels)
    losses = torch.full((3,), torch.nan)
    assert loss_rows.takes(student, teacher, labels)
    loss_rows.loss_rows(student, teacher, labels, losses, student, **case.settings)
    assert_close(case, losses, student, expected, gradient)
    assert losses[1] == 0 and not student[1].any()


def test_rows_may_be_parts_of_wider_ones_and_gradients_elsewhere_or_nowhere() -> None:
    case = Case(dtype=BF16, width=70, teacher=60)
    student, teacher, labels = case.tensors()
    expected, gradient = twin(case, student, teacher, labels)
    wide = torch.full((3, 128), 9.0, dtype=BF16)
    wide[:, :70] = student
    grads = torch.full((3, 80), 7.0)
    losses = torch.empty(4)[1:]  # which does not start at 16 bytes
    loss_rows.loss_rows(wide[:, :70], teacher, labels, losses, grads[:, :70], **case.settings)
    assert_close(case, losses, grads[:, :70], expected, gradient)
    assert torch.equal(wide[:, :70], student) and (wide[:, 70:] == 9).all() and (grads[:, 70:] == 7).all()
    without = torch.empty(3)
    loss_rows.loss_rows(wide[:, :70], teacher, labels, without, None, **case.settings)
    assert torch.equal(without, losses) and torch.equal(wide[:, :70], student)


def test_ignored_rows_are_not_read_and_labels_that_are_no_columns_give_nan() -> None:
    case = Case(width=20, teacher=20)
    student, teacher, _ = case.tensors()
    assert teacher is not None
    student[0], student[1], teacher[0] = torch.nan, torch.inf, torch.nan
    losses = torch.empty(3)
    loss_rows.loss_rows(student, teacher, torch.tensor([-100, -100, 20]), losses, student)
    assert losses[:2].tolist() == [0, 0] and not student[:2].any() and losses[2].isnan()
    student = torch.ones(2, 20)
    loss_rows.loss_rows(student, None, torch.tensor([-100, -100]), losses, student)
    assert not student.any() and not losses[:2].any()
    loss_rows.loss_rows(student[:0], None, torch.tensor([], dtype=torch.long), losses, None)


def test_what_the_kernel_cannot_do_is_left_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    student, labels = torch.randn(3, 8), torch.tensor([1, 2, 3])
    assert loss_rows.takes(student, student, labels) and loss_rows.takes(student[:, :5], None, labels)
    assert not loss_rows.takes(student.double(), None, labels)
    assert not loss_rows.takes(student, student.double(), labels)
    assert not loss_rows.takes(student, student[:2], labels)
    assert not loss_rows.takes(student.t().contiguous().t(), None, labels)
    assert not loss_rows.takes(student, None, labels.int())
    assert not loss_rows.takes(student, None, torch.zeros(6, dtype=torch.long)[::2])
    assert not loss_rows.takes(student, None, labels.to("meta"))
    monkeypatch.setenv("AST_SPARSE_GPU", "plain")
    assert not loss_rows.takes(student, None, labels)


SOFT = DistillationConfig(kind="reverse_kl", ce_weight=0.3, kl_weight=2.0, temperature=3.0)


@pytest.mark.parametrize(
    "case, config",
    [
        (HeadCase(FP32, softcap=2.0), DistillationConfig(alpha=0.67)),
        (HeadCase(FP32, vocab=16, teacher_vocab=13, scale=0.3), SOFT),
        (HeadCase(FP32), None),
    ],
    ids=["kl", "reverse_kl", "cross-entropy"],
)
def test_the_loss_from_hidden_states_takes_the_kernel(
    case: HeadCase, config: DistillationConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_kernel(monkeypatch)
    monkeypatch.setattr(sliced, "_MIN_TOKENS", 8)
    monkeypatch.setattr(sliced, "_ELEMENTS", 1)
    monkeypatch.setattr(sliced, "_EVEN", 4)
    check(case, config, 2e-6)
    assert rows == [8, 8, 2]


def test_the_loss_of_whole_logits_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of_kernel(monkeypatch)
    student, teacher = torch.randn(2, 1, 3, 40)
    student.requires_grad_()
    labels, by_position = torch.tensor([[4, -100, 39]]), torch.zeros(3)
    config = DistillationConfig(ce_weight=1.0, kl_weight=0.5, temperature=2.0)
    loss, tokens = distillation_loss(student, teacher, labels, config, by_position=by_position)
    whole = student.detach().double().requires_grad_()
    expected = plain_loss(whole, teacher.double(), labels, config)
    grads = [torch.autograd.grad(3 * each, of)[0].double() for each, of in ((loss, student), (expected, whole))]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
    assert tokens == 2 and torch.allclose(by_position.sum(), loss) and by_position[1] == 0
    assert rows == [3]


def rows_of_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which the rows of each call of the kernel are added."""
    rows: list[int] = []
    kernel = loss_rows.loss_rows

    def counted(student: Tensor, *args: object, **kwargs: object) -> None:
        rows.append(len(student))
        kernel(student, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loss_rows, "loss_rows", counted)
    return rows
