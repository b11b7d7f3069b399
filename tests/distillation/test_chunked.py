import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation import chunked, gpu_rows, sliced
from ast_sparse.distillation import logits as logits_loss
from ast_sparse.distillation.chunked import chunked_distillation_loss
from ast_sparse.distillation.gpu_rows import rows_function, write_rows
from ast_sparse.distillation.head import OutputHead
from ast_sparse.distillation.logits import distillation_loss
from ast_sparse.distillation.terms import Terms
from tests.distillation.plain_losses import CONFIGS, plain_loss

VOCAB, HIDDEN, TEACHER_HIDDEN = 13, 8, 6


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_MIN_CHUNK", 1)
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", 4 * VOCAB)


class Case:
    """Random hidden states and heads of both models, and labels of which some are ignored."""

    def __init__(self, dtype: torch.dtype = torch.float64, vocab: int = VOCAB, teacher_vocab: int = VOCAB, **head: Any):
        torch.manual_seed(0)
        self.hidden = torch.randn(2, 9, HIDDEN, dtype=dtype, requires_grad=True)
        self.teacher_hidden = torch.randn(2, 9, TEACHER_HIDDEN, dtype=dtype)
        self.head = OutputHead(nn.Linear(HIDDEN, vocab, dtype=dtype), **head)
        self.teacher_head = OutputHead(nn.Linear(TEACHER_HIDDEN, teacher_vocab, dtype=dtype), **head)
        self.labels = torch.randint(0, min(vocab, teacher_vocab), (2, 9))
        self.labels[0, 3] = self.labels[1, 5:] = -100

    def loss(self, config: DistillationConfig | None) -> Tensor:
        loss, tokens = chunked_distillation_loss(
            self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.labels, config
        )
        assert tokens == (self.labels != -100).sum()
        return loss

    def inputs(self) -> list[Tensor]:
        return [self.hidden, *self.head.linear.parameters()]

    def plain(self, config: DistillationConfig | None) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of copies in float64, logits whole, by autograd."""
        hidden = self.hidden.detach().double().requires_grad_()
        ours, theirs = (replace(h, linear=copy.deepcopy(h.linear).double()) for h in (self.head, self.teacher_head))
        student, teacher = logits(ours, hidden), logits(theirs, self.teacher_hidden.double())
        width = min(student.shape[-1], teacher.shape[-1])
        ce_weight, kl_weight = (1.0, 0.0) if config is None else config.weights
        loss = ce_weight * plain_loss(student, student, self.labels, None)  # over all columns
        if kl_weight > 0 and config is not None:
            soft = replace(config, alpha=None, ce_weight=0.0, kl_weight=kl_weight)
            loss = loss + plain_loss(student[..., :width], teacher[..., :width], self.labels, soft)
        return loss, list(torch.autograd.grad(loss, [hidden, *ours.linear.parameters()]))


def logits(head: OutputHead, hidden: Tensor) -> Tensor:
    values = head.linear(hidden) * head.scale
    return values if head.softcap is None else head.softcap * torch.tanh(values / head.softcap)


def check(case: Case, config: DistillationConfig | None, tolerance: float = 1e-10) -> None:
    loss = case.loss(config)
    expected, expected_grads = case.plain(config)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(torch.autograd.grad(3 * loss, case.inputs()), expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), 3 * theirs, rtol=tolerance, atol=tolerance)


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


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_dtype_and_keeps_gradients_in_float32(
    config: DistillationConfig | None, dtype: torch.dtype
) -> None:
    case = Case(torch.float32)
    with torch.autocast("cpu", dtype):
        loss = case.loss(config)
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


@pytest.fixture
def in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """All positions in slices of eight, as on a GPU, by PyTorch's operations on three or four rows at once."""
    for module in (chunked, logits_loss):
        monkeypatch.setattr(module, "counts_in_place", lambda device: True)
    for name, value in (("_ELEMENTS", 1), ("_MIN_TOKENS", 8), ("_EVEN", 4)):
        monkeypatch.setattr(sliced, name, value)
    monkeypatch.setattr(gpu_rows, "_EAGER_ELEMENTS", 50)


HEADS: list[dict[str, Any]] = [
    dict(softcap=2.0), dict(scale=1.7, softcap=1.5), dict(vocab=13, teacher_vocab=16), dict(vocab=16, teacher_vocab=13)
]  # fmt: skip


@pytest.mark.usefixtures("in_slices")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_slices_of_all_positions_equal_autograd(config: DistillationConfig | None, head: dict[str, Any]) -> None:
    check(Case(**head), config)


@pytest.mark.usefixtures("in_slices")
@pytest.mark.parametrize("config", CONFIGS)
def test_slices_in_low_precision_whole_logits_and_losses_of_positions(config: DistillationConfig | None) -> None:
    test_float32_to_rounding(config)
    for dtype in (torch.bfloat16, torch.float16):
        test_autocast_multiplies_in_its_dtype_and_keeps_gradients_in_float32(config, dtype)
    test_loss_of_a_position_is_that_of_a_batch_where_it_alone_counts(config)


@pytest.mark.usefixtures("in_slices")
def test_slices_treat_ignored_positions_frozen_heads_and_float16_as_chunks_do() -> None:
    test_infinite_hidden_states_at_ignored_positions_do_not_spoil_the_sum()
    test_a_batch_without_counted_positions_is_zero_with_zero_gradients()
    test_a_frozen_head_gets_no_gradient()
    test_a_head_tied_to_the_embedding_adds_to_its_gradient()
    test_a_second_backward_pass_is_refused()
    test_in_float16_rare_tokens_keep_their_gradient(DistillationConfig(alpha=0.67))
    test_float16_logits_get_the_gradient_of_a_loss_scale_that_float16_does_not_have()
    case = Case()
    loss, tokens = chunked_distillation_loss(case.hidden[:, :0], case.head, None, None, case.labels[:, :0], None)
    assert loss == 0 == tokens and not torch.autograd.grad(loss, case.head.linear.weight)[0].any()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_rows_in_place_equal_those_of_the_function_that_is_compiled(
    config: DistillationConfig | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    labels, terms = torch.tensor([3, -100, 15, 0, -100, 16]), Terms.of(config)
    for width, softcap in ((13, None), (16, 1.5), (19, None)):
        student = (3 * torch.randn(6, 16)).to(dtype)
        teacher = (3 * torch.randn(6, width)).to(dtype) if terms.kl_weight else None
        student[1, 2], student[4] = float("inf"), float("nan")  # ignored
        kept = None if teacher is None else teacher.clone()
        results = []
        for in_place in (True, False):
            losses, grads = torch.empty(6, dtype=torch.promote_types(dtype, torch.float32)), student.clone()
            given = (grads, teacher, labels, losses, grads)
            if in_place:
                write_rows(*given, terms, softcap=softcap, teacher_softcap=softcap, scale=4.0)
            else:
                rows_function(terms, softcap, softcap, 4.0)(*given)
            results.append((losses, grads[:5]))  # the gradient of a label that is no column is not defined
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)
        assert results[0][0][[1, 4]].tolist() == [0, 0] and results[0][0][5].isnan() and not results[0][1][[1, 4]].any()
        assert teacher is None or torch.equal(teacher, kept)


class Kernels(torch.utils._python_dispatch.TorchDispatchMode):
    """The operations that would be kernels on a GPU, or would wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "new_empty", "detach", "_reshape_alias"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("in_slices")
def test_slices_wait_for_nothing_and_take_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    case, config = Case(torch.float32), DistillationConfig(alpha=0.67)
    hidden, teacher, labels = case.hidden.flatten(0, 1), case.teacher_hidden.flatten(0, 1), case.labels.flatten()

    def kernels(tokens: int) -> Counter[str]:
        with Kernels() as seen:
            chunked_distillation_loss(
                hidden[:tokens], case.head, teacher[:tokens], case.teacher_head, labels[:tokens], config
            )
        return Counter(seen.names)

    waiting = {"nonzero", "_local_scalar_dense", "equal", "is_nonzero", "masked_select"}
    assert not waiting & kernels(16).keys()
    monkeypatch.setattr(sliced, "write_rows", lambda *args, **kwargs: None)  # one kernel on a GPU
    case.head.linear.bias = case.teacher_head.linear.bias = None
    counts = [kernels(tokens) for tokens in (8, 16)]
    assert counts[1] - counts[0] == Counter(mm=3, addmm_=1, masked_fill=1)
    assert counts[0].total() <= 12


@pytest.mark.usefixtures("in_slices")
def test_where_the_kernel_cannot_run_one_function_is_compiled_for_all_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    functions: list[Any] = []

    def compile_kernel(function: Any) -> Any:
        functions.append(function)
        return function

    monkeypatch.setattr(gpu_rows, "_compiles", lambda logits: True)
    monkeypatch.setattr(gpu_rows, "compile_kernel", compile_kernel)
    gpu_rows.compiled_rows.cache_clear()
    try:
        check(Case(softcap=2.0), DistillationConfig(alpha=0.67))
    finally:
        gpu_rows.compiled_rows.cache_clear()
    assert len(functions) == 1


def test_slices_are_large_even_and_of_about_one_size() -> None:
    assert sliced.slice_size(4096, 32000) == 2048 and sliced.slice_size(4096, 128256) == 1024
    assert sliced.slice_size(8 * 2048, 49152) == 1280 and sliced.slice_size(5, 49152) == 5
    assert sliced.slice_size(0, 100) == 1


def test_the_numbers_of_the_loss_are_constants_of_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        scalars.append(sum(isinstance(each, Tensor) and each.dim() == 0 for each in inputs))
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, options, **others: compiled(function, backend=backend, **others)
    )
    kernel = gpu_rows.compiled_rows.__wrapped__(Terms("kl", 0.3, 0.7, 2.0), 3.0, None, 4.0)
    student, teacher, labels = torch.randn(5, 18), torch.randn(5, 14), torch.tensor([1, -100, 15, 3, -100])
    kernel(student, teacher, labels, torch.empty(5), student)
    assert scalars == [0]


def test_the_function_of_rows_is_one_graph() -> None:
    terms, softcap = Terms("reverse_kl", 0.3, 0.7, 2.0), 3.0
    rows = rows_function(terms, softcap, None, 4.0)
    compiled = torch.compile(rows, backend="eager", fullgraph=True, dynamic=True)
    student, teacher, labels = torch.randn(5, 16), torch.randn(5, 13), torch.tensor([1, -100, 15, 3, -100])
    losses, grads, expected, gradient = torch.empty(5), torch.empty(5, 16), torch.empty(5), student.clone()
    write_rows(student, teacher, labels, expected, gradient.copy_(student), terms, softcap=softcap, scale=4.0)
    compiled(student, teacher, labels, losses, grads)
    compiled(student, teacher, labels, losses, student)  # in place
    for found in (grads, student):
        torch.testing.assert_close(found, gradient)
    torch.testing.assert_close(losses, expected)
