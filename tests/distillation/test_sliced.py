"""The loss in slices of all positions, as on a GPU."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation import chunked, gpu_rows, sliced
from ast_sparse.distillation import logits as logits_loss
from ast_sparse.distillation.chunked import chunked_distillation_loss
from ast_sparse.distillation.gpu_rows import rows_function, write_rows
from ast_sparse.distillation.terms import Terms
from tests.distillation import test_chunked as of_chunks
from tests.distillation.loss_cases import Case, check
from tests.distillation.plain_losses import CONFIGS


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
    of_chunks.test_float32_to_rounding(config)
    for dtype in (torch.bfloat16, torch.float16):
        of_chunks.test_autocast_multiplies_in_its_dtype_and_keeps_gradients_in_float32(config, dtype)
    of_chunks.test_loss_of_a_position_is_that_of_a_batch_where_it_alone_counts(config)


@pytest.mark.usefixtures("in_slices")
def test_slices_treat_ignored_positions_frozen_heads_and_float16_as_chunks_do() -> None:
    of_chunks.test_infinite_hidden_states_at_ignored_positions_do_not_spoil_the_sum()
    of_chunks.test_a_batch_without_counted_positions_is_zero_with_zero_gradients()
    of_chunks.test_a_frozen_head_gets_no_gradient()
    of_chunks.test_a_head_tied_to_the_embedding_adds_to_its_gradient()
    of_chunks.test_a_second_backward_pass_is_refused()
    of_chunks.test_in_float16_rare_tokens_keep_their_gradient(DistillationConfig(alpha=0.67))
    of_chunks.test_float16_logits_get_the_gradient_of_a_loss_scale_that_float16_does_not_have()
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
            results.append((losses, grads[:5]))  # the gradient of a label that is not a column is not defined
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


@pytest.mark.usefixtures("in_slices")
def test_a_compiled_function_that_fails_when_it_runs_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def kernel(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("out of resource: shared memory, Required: 1, Hardware limit: 0.\nmore lines")

    monkeypatch.setattr(gpu_rows, "compiler_fault", lambda device: None)
    monkeypatch.setattr(gpu_rows, "setting", lambda: "auto")
    monkeypatch.setattr(gpu_rows, "_is_served", lambda logits: True)  # as logits on a GPU
    monkeypatch.setattr(gpu_rows, "compiled_rows", lambda *_: kernel)
    monkeypatch.setattr(gpu_rows, "_given_up", set())
    for _ in range(2):
        check(Case(softcap=2.0), DistillationConfig(alpha=0.67))
    assert len(calls) == 1
    (line,) = [record.getMessage() for record in caplog.records if "PyTorch's operations" in record.getMessage()]
    assert "on cpu: compiled, it fails: RuntimeError: out of resource" in line and "\n" not in line

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_rows, "_given_up", set())
    monkeypatch.setattr(gpu_rows, "compiled_rows", lambda *_: no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        check(Case(), DistillationConfig(alpha=0.67))


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
