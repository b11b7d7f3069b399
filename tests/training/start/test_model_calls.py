"""Decoders that run compiled, with the loss outside their graphs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, PreTrainedModel

import ast_sparse.training.trainer as trainer_module
from ast_sparse import SparsityConfig
from ast_sparse.sparsity.model import sparse_layers, sparsify_model, use_masked_weights
from ast_sparse.training.start.model_calls import CompiledDecoders
from tests.models import VOCAB, tiny_config
from tests.training.small_runs import blocks, trainer, weights


def small_model() -> PreTrainedModel:
    config = tiny_config("llama")
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class Graphs:
    """A backend that runs a graph as it is, and notes the shapes of the tensors in it."""

    def __init__(self) -> None:
        self.shapes: list[list[tuple[int, ...]]] = []
        self.masked: list[bool] = []  # whether a graph makes a masked weight

    def __call__(self, graph: Any, inputs: Any) -> Any:
        parts = [part for part in graph.modules() if isinstance(part, GraphModule)]
        self.masked.append(any(node.target is torch.where for part in parts for node in part.graph.nodes))
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        self.shapes.append([tuple(value.shape) for value in values if isinstance(value, torch.Tensor)])
        return graph.forward


def test_compiled_decoders_train_and_evaluate_to_the_same_losses_without_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = Graphs()
    monkeypatch.setattr(
        trainer_module, "CompiledDecoders", lambda models, _, mode: CompiledDecoders(models, graphs, mode)
    )
    counters.clear()
    found = []
    for backend in (None, "eager"):
        args = dict(
            max_steps=2, gradient_accumulation_steps=2, torch_compile_backend=backend, per_device_eval_batch_size=4,
            bf16=True,
        )  # fmt: skip
        run = trainer(tmp_path / str(backend), small_model(), args=args, eval_dataset=blocks(count=8, seed=7))
        outputs: list[Any] = []
        run.model.register_forward_hook(lambda module, args, output, seen=outputs: seen.append(output.logits))
        run.train()
        assert all(layer.graph_copy is None for layer in sparse_layers(run.student).values())
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        found.append(([*losses, run.evaluate()["eval_loss"]], weights(run.student)))
        assert outputs and set(outputs) == {None}
        assert not any("forward" in vars(module) for module in (run.student.model, run.teacher.model))
    (plain, plain_weights), (compiled, compiled_weights) = found
    assert len(plain) == 3 and compiled == pytest.approx(plain, rel=1e-6)
    for name, tensor in plain_weights.items():
        torch.testing.assert_close(compiled_weights[name], tensor, rtol=1e-5, atol=1e-6)
    # one graph each for the student's training, the teacher, and the student's evaluation
    assert len(graphs.shapes) == 3 and not counters["graph_break"]
    assert graphs.masked == [False, False, True]  # in training they are kept
    for shapes in graphs.shapes:
        assert (4, 16, 32) in shapes
        assert not any(shape[-1:] == (VOCAB,) for shape in shapes)
    assert run.model_wrapped is run.model and "full logits" not in caplog.text


@pytest.mark.parametrize(
    ("backend", "mode", "variable", "reads"),
    [
        ("inductor", None, None, True),
        ("inductor", "reduce-overhead", None, False),
        ("inductor", None, "max-autotune", False),
        ("cudagraphs", None, None, False),
    ],
)
def test_copies_are_given_to_graphs_that_read_them_where_they_are(
    backend: str, mode: str | None, variable: str | None, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", variable or "default")
    model = small_model()
    sparsify_model(model, SparsityConfig())
    use_masked_weights(model, "kept")
    layer = next(iter(sparse_layers(model).values()))
    seen: list[torch.Tensor | None] = []
    decoders = CompiledDecoders([model], backend, mode)
    decoders._compiled = [(model.model, lambda: seen.append(layer.graph_copy))]  # in place of a compiled one
    with decoders:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                model.model()
            with torch.no_grad():
                layer.weight.mul_(2)
    assert layer.graph_copy is None
    with decoders:
        model.model()  # without autocast
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            model.model()
    assert [each is not None for each in seen] == [reads, reads, False, False]
    if seen[0] is not None and seen[1] is not None:
        assert torch.equal(seen[1], 2 * seen[0]) and seen[0].any()


def test_a_compiled_decoder_runs_inside_ddp(tmp_path: Path) -> None:
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for backend in (None, "eager"):
        run = trainer(
            tmp_path / str(backend), small_model(), distillation_config=None, args=dict(torch_compile_backend=backend)
        )
        use_masked_weights(run.student, "kept")
        model: Any = run.model.train()
        if backend is not None:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            model = DistributedDataParallel(model)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                loss = run.compute_loss(model, {"input_ids": ids, "labels": ids})
            loss.backward()
        finally:
            if backend is not None:
                dist.destroy_process_group()
        gradients.append({name: each.grad for name, each in run.model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_the_backward_pass_computes_blocks_again_compiled(tmp_path: Path) -> None:
    """As transformers 5.17 does: it checkpoints the call of a block, which looks up `forward` a second time."""
    run = trainer(tmp_path, small_model(), args=dict(max_steps=1, torch_compile_backend="eager"))
    part, _ = run._compiled._compiled[0]
    seen: list[bool] = []
    run.model.lm_head.weight.register_hook(lambda gradient: seen.append("forward" in vars(part)))
    run.train()
    assert seen == [True] and "forward" not in vars(part)
