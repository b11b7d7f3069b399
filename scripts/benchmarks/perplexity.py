"""What does a perplexity cost, in time and memory, compared with a plain loop over full logits?

Ours: `evaluate_blocks` on two windows of 1024 tokens, float32, random weights with the shapes of GPT-2 124M and of
SmolLM2-135M. Alternative: `model(input_ids, labels=input_ids).loss` of transformers on the same windows, without
gradients. Interleaved; memory beyond the model in child processes, with windows of 512 and of 1024 tokens. The losses
of both must agree to 1e-4.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ast_sparse.evaluation.perplexity import evaluate_blocks
from scripts.benchmarks.harness import PeakMemory, Result, Settings, interleave, main
from scripts.benchmarks.whole_step import move, new_model

TIME_GOAL = 0.80
WINDOWS = 2


def ours(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    return evaluate_blocks(model, list(blocks), progress=False).mean_nll


@torch.no_grad()
def plain(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    losses = [float(model(input_ids=block[None], labels=block[None], use_cache=False).loss) for block in blocks]
    return sum(losses) / len(losses)


SIDES = {"ours": ours, "plain": plain}


def case(name: str, window: int, device: torch.device) -> tuple[PreTrainedModel, torch.Tensor]:
    model = new_model(name).eval()
    move(model, device)
    return model, torch.randint(0, model.config.vocab_size, (WINDOWS, window), device=device)


def peak(side: str, name: str, window: int, device: torch.device) -> float:
    """MB beyond the model."""
    model, blocks = case(name, window, device)
    with PeakMemory() as memory:
        SIDES[side](model, blocks)
    return memory.above / 1e6


def measure(settings: Settings) -> Iterator[Result]:
    window = 32 if settings.quick else 512
    for name in ("tiny",) if settings.quick else ("gpt2", "smollm2"):
        model, blocks = case(name, 2 * window, settings.device)
        losses = [side(model, blocks) for side in SIDES.values()]
        if abs(losses[0] / losses[1] - 1) > 1e-4:
            raise ValueError(f"{name}: {losses[0]} and {losses[1]} are not the same loss.")
        calls = {key: partial(side, model, blocks) for key, side in SIDES.items()}
        times = interleave(calls, settings.pairs(20), warmup=1)
        about: dict[str, Any] = dict(question="perplexity", against="plain loop")
        shape = f"{name}, {WINDOWS} x {2 * window}"
        yield Result.of(times["ours"], times["plain"], case=shape, goal=TIME_GOAL, **about)
        del model, blocks, calls
        for tokens in (window, 2 * window):
            peaks = [settings.in_child(peak, side, name, tokens, settings.device) for side in SIDES]
            memory = f"{name}, {WINDOWS} x {tokens}, memory"
            yield Result.of(peaks[:1], peaks[1:], case=memory, unit="MB", **about)


if __name__ == "__main__":
    main(measure)
