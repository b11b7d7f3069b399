import pytest
import torch

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.sparsity.model import sparsify_model
from ast_sparse.sparsity.row_masks import fill_masks
from tests.models import tiny_model

CONFIGS = {
    "2:4": SparsityConfig(),
    "unstructured": SparsityConfig(pattern="unstructured"),
    "gmp": SparsityConfig(schedule="gmp", mask_interval=2),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_masks_slorb_and_errors_are_those_of_sparsify_model(name: str, start: float) -> None:
    slorb = SLoRBConfig(k=8, start=start)
    model = tiny_model("llama")
    report = sparsify_model(model, CONFIGS[name], slorb)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith(("mask", "slorb.S", "slorb.X")):
                value.fill_(1)
    errors = fill_masks(model, CONFIGS[name], slorb)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert errors == pytest.approx(report.errors)
