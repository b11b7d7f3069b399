"""Training with 16-bit copies of the masked weights is training without them, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ast_sparse import SparsityConfig
from ast_sparse.sparsity import masked_copy
from ast_sparse.sparsity.model import sparse_layers
from tests.training.small_runs import blocks, trainer, weights

WITH_RECOMPUTATION = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize(("steps", "args"), [(20, {}), (6, WITH_RECOMPUTATION)], ids=["plain", "checkpointing"])
def test_losses_and_weights_are_equal_to_the_bit(
    steps: int, args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accumulation, mask refreshes and evaluations between the steps."""
    written: list[Tensor] = []
    own = masked_copy.masked_as
    monkeypatch.setattr(masked_copy, "masked_as", lambda w, m, d: written.append(w) or own(w, m, d))

    def run(choice: Any) -> tuple[list[float], dict[str, Tensor], int]:
        written.clear()
        evaluated = dict(eval_strategy="steps", eval_steps=5)
        shape = dict(bf16=True, max_steps=steps, gradient_accumulation_steps=2, per_device_train_batch_size=2)
        sparsity = SparsityConfig(mask_interval=3, mask_decay=1e-2, masked_weights=choice)
        made = trainer(
            tmp_path / choice, sparsity=sparsity, args=shape | evaluated | args, eval_dataset=blocks(4, seed=1)
        )
        made.train()
        assert all(layer.masked_copy is None for layer in sparse_layers(made.student).values())  # the memory is free
        losses = [
            row[key] for row in made.state.log_history for key in ("loss", "eval_loss", "grad_norm") if key in row
        ]
        return losses, weights(made.student), len(written)

    (losses, kept, writes), (expected, wanted, none) = run("auto"), run("made")
    assert losses == expected and len(losses) > 2 * steps
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    layers = 14
    assert none == 0 and writes == steps * layers  # once a step, though a step has two micro-batches


def test_an_error_in_training_frees_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, args=dict(bf16=True))
    monkeypatch.setattr(run._speed, "count", lambda tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert all(layer.masked_copy is None for layer in sparse_layers(run.student).values())
