"""Semi-structured products: which weights and devices have them, and what PyTorch's operators are given."""

import pytest
import torch

from ast_sparse.kernels.gpu import cusparselt
from tests.kernels.gpu.cpu_cusparselt import cpu_cusparselt

CPU = torch.device("cpu")
fault = cusparselt.fault.__wrapped__  # not remembered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(16,), (1, 1), (2, 5), (8,)], ids=str)
def test_any_number_of_tokens_is_multiplied(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(32, 64).to(dtype) * torch.tensor([0, 1, 1, 0]).repeat(16)
    x, bias = torch.randn(*shape, 64).to(dtype), torch.randn(32).to(dtype)
    with cpu_cusparselt(monkeypatch) as calls:
        compressed = cusparselt.compress(weight)
        assert compressed.nbytes == weight.nbytes * 9 / 16
        for each in (None, bias):
            found = cusparselt.linear(x, compressed, each)
            torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, each))
        strided = torch.randn(64, 6).to(dtype).t()
        torch.testing.assert_close(cusparselt.linear(strided, compressed, None), strided @ weight.t())
    tokens = x.shape[:-1].numel()
    assert calls.multiplied == [(tokens + -tokens % 8, 64)] * 2 + [(8, 64)]


def test_only_some_shapes_and_one_gpu_of_a_thread_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes(rows: int = 64, columns: int = 128, dtype: torch.dtype = torch.bfloat16, gpu: int = 0) -> bool:
        return cusparselt.takes(rows, columns, dtype, torch.device("cuda", gpu))

    monkeypatch.setattr(cusparselt, "_handles", {})
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert not takes(gpu=1)  # and no handle was made
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert takes() and takes(dtype=torch.float16) and not takes(gpu=1)
    assert not (takes(48) or takes(columns=96) or takes(dtype=torch.float32))


def test_a_device_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault(CPU) == "they need an NVIDIA GPU, and a PyTorch that was built with cuSPARSELt."
    with cpu_cusparselt(monkeypatch) as calls:
        assert not cusparselt._wrong(CPU) and calls.multiplied == [(16, 64)]
        monkeypatch.setattr(cusparselt, "linear", lambda x, compressed, bias: torch.zeros(9, 32, dtype=x.dtype))
        assert cusparselt._wrong(CPU)
        cusparselt._handles.update(dict.fromkeys(cusparselt._handles, torch.device("cuda", 1)))
        with pytest.raises(RuntimeError, match="on another GPU"):
            cusparselt._wrong(CPU)
