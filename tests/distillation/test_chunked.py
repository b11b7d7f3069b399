from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation import chunked
from ast_sparse.distillation.chunked import chunked_distillation_loss
from ast_sparse.distillation.logits import distillation_loss
from tests.distillation.loss_cases import HIDDEN, TEACHER_HIDDEN, VOCAB, Case, check, logits
from tests.distillation.plain_losses import CONFIGS, plain_loss


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_MIN_CHUNK", 1)
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", 4 * VOCAB)


@pytest.mark.parametrize("config", CONFIGS)
def test_loss_and_gradients_equal_autograd_through_whole_logits_in_float64(config: DistillationConfig | None) -> None:
    check(Case(), config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("head", [dict(softcap=2.0), dict(scale=0.3), dict(scale=1.7, softcap=1.5)], ids=str)
def test_scaled_and_soft_capped_logits(config: DistillationConfig | None, head: dict[str, float]) -> None:
    check(Case(**head), config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(13, 16), (16, 13)])
def test_padding_of_one_vocabulary_stays_out_of_the_divergence(
    config: DistillationConfig | None, vocab: int, teacher_vocab: int
) -> None:
    check(Case(vocab=vocab, teacher_vocab=teacher_vocab), config)


@pytest.mark.parametrize("config", CONFIGS)
def test_float32_to_rounding(config: DistillationConfig | None) -> None:
    check(Case(torch.float32), config, 2e-5)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Dtypes of the matrices that are multiplied, by the columns of the left and of the right one."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[tuple[int, int], set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.dtypes.setdefault((left.shape[1], right.shape[1]), set()).update((left.dtype, right.dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_dtype_and_keeps_gradients_in_float32(
    config: DistillationConfig | None, dtype: torch.dtype
) -> None:
    case = Case(torch.float32)
    with torch.autocast("cpu", dtype), Products() as products:
        loss = case.loss(config)
    assert products.dtypes[HIDDEN, VOCAB] == {dtype}
    grads = torch.autograd.grad(loss, case.inputs())
    expected, expected_grads = case.plain(config)
    assert loss.dtype == torch.float32 and all(grad.dtype == torch.float32 for grad in grads)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=5e-2, atol=5e-2)


def test_a_teacher_in_bf16_multiplies_in_bf16() -> None:
    case = Case(torch.float32)
    case.teacher_head.linear.bfloat16()
    case.teacher_hidden = case.teacher_hidden.bfloat16()
    check(case, DistillationConfig(alpha=0.67), 2e-2)
    with Products() as products:
        case.loss(DistillationConfig(alpha=0.67))
    assert products.dtypes[TEACHER_HIDDEN, VOCAB] == {torch.bfloat16}
    assert products.dtypes[HIDDEN, VOCAB] == {torch.float32}


def test_a_head_tied_to_the_embedding_adds_to_its_gradient() -> None:
    embedding = nn.Embedding(VOCAB, HIDDEN, dtype=torch.float64)
    head = nn.Linear(HIDDEN, VOCAB, bias=False)
    head.weight = embedding.weight
    ids = torch.randint(0, VOCAB, (2, 9))
    labels = ids.roll(-1, 1)
    loss, _ = chunked_distillation_loss(embedding(ids), head, None, None, labels, None)
    (ours,) = torch.autograd.grad(loss, embedding.weight)
    logits = embedding(ids) @ embedding.weight.t()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (theirs,) = torch.autograd.grad(expected, embedding.weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, theirs)


def test_a_frozen_head_gets_no_gradient() -> None:
    case = Case()
    case.head.linear.requires_grad_(False)
    case.loss(DistillationConfig(alpha=0.5)).backward()
    assert case.hidden.grad is not None and case.head.linear.weight.grad is None


def test_gradients_of_micro_batches_add_up() -> None:
    case, config = Case(), DistillationConfig(alpha=0.5)
    whole = torch.autograd.grad(case.loss(config), case.inputs())
    for row in range(2):
        loss, _ = chunked_distillation_loss(
            case.hidden[row], case.head, case.teacher_hidden[row], case.teacher_head, case.labels[row], config
        )
        loss.backward()
    for grad, each in zip(whole, case.inputs(), strict=True):
        torch.testing.assert_close(grad, each.grad)


def test_infinite_hidden_states_at_ignored_positions_do_not_spoil_the_sum() -> None:
    case = Case()
    with torch.no_grad():
        case.hidden[case.labels == -100] = float("inf")
    loss = case.loss(DistillationConfig(alpha=0.5))
    grads = torch.autograd.grad(loss, case.inputs())
    assert torch.isfinite(loss) and all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[0][case.labels == -100].any()


def test_a_batch_without_counted_positions_is_zero_with_zero_gradients() -> None:
    case = Case()
    case.labels.fill_(-100)
    loss = case.loss(DistillationConfig(alpha=0.5))
    assert loss == 0 and not any(grad.any() for grad in torch.autograd.grad(loss, case.inputs()))


def test_a_second_backward_pass_is_refused() -> None:
    loss = Case().loss(None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_logits_of_all_tokens_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple) else (out,):
                if isinstance(each, Tensor) and each.dim() == 2 and each.shape[1] == VOCAB:
                    self.rows = max(self.rows, len(each))
            return out

    case = Case()
    with Largest() as seen:
        case.loss(DistillationConfig(ce_weight=1.0, kl_weight=1.0, temperature=2.0)).backward()
    assert 4 <= seen.rows <= HIDDEN  # a transposed head has as many columns
    assert (case.labels != -100).sum() > HIDDEN


def test_chunks_are_of_about_one_size() -> None:
    assert chunked._chunk_size(0, VOCAB) == 1
    assert chunked._chunk_size(9, VOCAB) == 3


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = Case()
    linear = case.head.linear
    with pytest.raises(ValueError, match="labels"):
        chunked_distillation_loss(case.hidden, linear, None, None, case.labels[:, 1:], None)
    with pytest.raises(ValueError, match="needs hidden states"):
        chunked_distillation_loss(case.hidden, linear, None, None, case.labels, DistillationConfig())
    with pytest.raises(ValueError, match="teacher"):
        chunked_distillation_loss(
            case.hidden, linear, case.teacher_hidden[:1], case.teacher_head, case.labels, DistillationConfig()
        )


@pytest.mark.parametrize("config", CONFIGS)
def test_loss_of_a_position_is_that_of_a_batch_where_it_alone_counts(config: DistillationConfig | None) -> None:
    case = Case()
    expected = torch.zeros(case.labels.numel(), dtype=torch.float64)
    for place in (case.labels.flatten() != -100).nonzero().flatten().tolist():
        alone = torch.full_like(case.labels, -100)
        alone.view(-1)[place] = case.labels.view(-1)[place]
        student, teacher = logits(case.head, case.hidden), logits(case.teacher_head, case.teacher_hidden)
        expected[place] = plain_loss(student, teacher, alone, config).detach()
    found = [torch.zeros_like(expected), torch.zeros_like(expected)]
    chunked_distillation_loss(
        case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.labels, config, by_position=found[0]
    )
    whole = [logits(case.head, case.hidden), logits(case.teacher_head, case.teacher_hidden).detach()]
    distillation_loss(*whole, case.labels, config, by_position=found[1])
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-10, atol=1e-12)
        assert not each.requires_grad


RARE = slice(VOCAB // 2, None)


def rare(dtype: torch.dtype) -> Case:
    """The second half of the vocabulary has probabilities of about 1e-9; values that float16 has."""
    case = Case(dtype)
    with torch.no_grad():
        for head in (case.head.linear, case.teacher_head.linear):
            head.bias[RARE] -= 18
        for tensor in (case.hidden, case.teacher_hidden, *case.head.linear.parameters()):
            tensor.copy_(tensor.half())
    case.labels.clamp_(max=VOCAB // 2 - 1)
    return case


@pytest.mark.parametrize(
    "config", [None, DistillationConfig(alpha=0.67), DistillationConfig(kind="reverse_kl")], ids=str
)
def test_in_float16_rare_tokens_keep_their_gradient(config: DistillationConfig | None) -> None:
    case, factor = rare(torch.float32), 2.0**16 / 4096  # as a GradScaler and the tokens of a step make it
    _, expected = case.plain(config)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = case.loss(config)
    for ours, theirs in zip(torch.autograd.grad(factor * loss, case.inputs())[1:], expected[1:], strict=True):
        error = (ours[RARE].double() / factor - theirs[RARE]).norm() / theirs[RARE].norm()
        assert error < 0.03, error  # a logit of 18 is rounded to 1/64


def test_float16_logits_get_the_gradient_of_a_loss_scale_that_float16_does_not_have() -> None:
    case = rare(torch.float16)
    student = case.head.logits(case.hidden).detach().requires_grad_()
    whole = student.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(2.0**16 * plain_loss(whole, whole, case.labels, None), whole)
    (grad,) = torch.autograd.grad(2.0**16 * distillation_loss(student, None, case.labels, None)[0], student)
    torch.testing.assert_close(grad.double(), expected, rtol=0.01, atol=1e-6)
