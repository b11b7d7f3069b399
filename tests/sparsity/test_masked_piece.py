from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ast_sparse.sparsity.masked_piece import MaskedPiece
from tests.sparsity.small_layers import sparse_linear


class ThreeProcesses:
    def size(self) -> int:
        return 3


def gathered(piece: MaskedPiece, rows: int, dtype: torch.dtype | None, layer: nn.Module | None = None) -> Tensor:
    mesh: Any = ThreeProcesses()
    size = torch.Size((rows, *piece.shape[1:]))
    (sent,), _ = piece.fsdp_pre_all_gather(mesh, size, (), layer or nn.Linear(1, 1), MixedPrecisionPolicy(dtype))
    return sent


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pruned_weights_are_sent_as_plus_zero_and_a_short_piece_is_filled_up(dtype: torch.dtype | None) -> None:
    piece = torch.tensor([[1.0, -2.0, 3.0, -4.0]]).as_subclass(MaskedPiece)
    piece.mask = torch.tensor([[True, False, False, True]])
    sent = gathered(piece, 6, dtype)
    assert type(sent) is Tensor and sent.dtype == (dtype or torch.float32)
    assert sent.tolist() == [[1, 0, 0, -4], [0, 0, 0, 0]]  # two rows a process
    assert not torch.signbit(sent[sent == 0]).any()


def test_a_layer_with_a_dense_forward_pass_sends_its_whole_rows_in_training_alone() -> None:
    piece = torch.tensor([[1.0, -2.0, 3.0, -4.0]]).as_subclass(MaskedPiece)
    piece.mask = torch.tensor([[True, False, False, True]])
    layer = sparse_linear()
    layer.dense_forward = True
    for training, expected in ((True, [1, -2, 3, -4]), (False, [1, 0, 0, -4])):
        sent = gathered(piece, 3, None, layer.train(training))
        assert sent.tolist() == [expected]


def test_a_piece_without_rows_sends_as_many_as_the_others() -> None:
    piece = torch.empty(0, 4).as_subclass(MaskedPiece)
    piece.mask = torch.empty(0, 4, dtype=torch.bool)
    assert gathered(piece, 2, None).tolist() == [[0, 0, 0, 0]]


def test_a_dense_piece_is_sent_as_it_is_and_results_of_operations_are_plain() -> None:
    values = torch.randn(2, 4)
    piece = values.as_subclass(MaskedPiece)
    assert gathered(piece, 6, None).data_ptr() == values.data_ptr()
    for result in (piece + 1, piece.detach(), piece.view(-1)):
        assert type(result) is Tensor
