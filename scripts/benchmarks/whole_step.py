"""What do a whole sparse retraining step and its memory cost, compared with dense distillation in a plain loop?

Ours: `SparseTrainer` in float32, 2:4, α = 0.67, batch 8 x 256, random weights with the shapes of GPT-2 124M and of
SmolLM2-135M; one of the measured steps refreshes the masks. Also with activation checkpointing, which the alternative
does not have: it saves memory and costs time. Alternative: a loop with the dense model of transformers as the student,
the same teacher, `F.kl_div` on the logits of both and the model's own loss, clipping, fused AdamW.
Each side runs in its own process, in turns: the mean time of the steps after the first, and the peak of resident
memory, less what Python and its modules held before the models were made, on both sides.
The floor is what every step needs: student forward and backward, teacher forward, one optimizer pass, without loss and
clipping. The floor and the alternative use PyTorch's own products.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from ast_sparse import DistillationConfig, SparseTrainer, SparsityConfig
from scripts.benchmarks.harness import PeakMemory, Result, Settings, main

ALPHA, DECAY = 0.67, 6e-5
OURS = {"ours": "", "checkpointed": ", ours with checkpointing"}
GOALS = {"plain": (0.80, 0.50), "floor": (None, None)}  # of time and of memory, by the loop that is compared with
STEPS = 2  # measured, after one that is not
OPTIONS: dict[str, Any] = dict(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1)


def config_of(name: str) -> PreTrainedConfig:
    """The shape of a model; `gpt2, no dropout` is trained as the public AST code trains it."""
    if name == "gpt2":
        return GPT2Config()
    if name == "gpt2, no dropout":
        return GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if name == "smollm2":
        return LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip


def new_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)


def move(model: nn.Module, device: torch.device) -> None:
    """Move in place; type checkers cannot read the type of `PreTrainedModel.to`."""
    model.to(device)


def plain(
    model: PreTrainedModel, ids: torch.Tensor, has_loss: bool, around: AbstractContextManager[Any] | None = None
) -> list[float]:
    """Seconds of each step of the plain loop, or of the floor, inside the context `around`."""
    device = ids.device
    move(model.train(), device)
    teacher = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    move(teacher, device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS)
    times = []
    with around or nullcontext():
        for batch in ids:
            start = time.perf_counter()
            if has_loss:
                outputs = model(input_ids=batch, labels=batch, use_cache=False)
                with torch.no_grad():
                    reference = teacher(input_ids=batch, use_cache=False).logits[:, :-1]
                log_s, log_t = outputs.logits[:, :-1].log_softmax(-1), reference.log_softmax(-1)
                kl = F.kl_div(log_s.flatten(0, 1), log_t.flatten(0, 1), reduction="batchmean", log_target=True)
                loss = (1 - ALPHA) * outputs.loss + ALPHA * kl
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            else:
                logits = model(input_ids=batch, use_cache=False).logits
                with torch.no_grad():
                    teacher(input_ids=batch, use_cache=False)
                logits.backward(torch.ones((), device=device).expand_as(logits))
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return times


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.start)


def ours(
    model: PreTrainedModel,
    ids: torch.Tensor,
    checkpointing: bool = False,
    bf16: bool = False,
    around: AbstractContextManager[Any] | None = None,
) -> list[float]:
    """Seconds of each step of SparseTrainer, inside the context `around`.

    Args:
        bf16: with bf16 autocast; otherwise in float32.
    """
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=len(ids), per_device_train_batch_size=ids.shape[1], save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, learning_rate=OPTIONS["lr"],
            adam_beta2=OPTIONS["betas"][1], weight_decay=OPTIONS["weight_decay"], gradient_checkpointing=checkpointing,
            bf16=bf16, use_cpu=ids.device.type == "cpu",
        )  # fmt: skip
        trainer = SparseTrainer(
            model, args,
            sparsity_config=SparsityConfig(mask_interval=STEPS, mask_decay=DECAY),
            distillation_config=DistillationConfig(alpha=ALPHA),
            train_dataset=[{"input_ids": row.tolist()} for row in ids.cpu().flatten(0, 1)],
        )  # fmt: skip
        trainer.add_callback(clock)
        with around or nullcontext():
            trainer.train()
    return clock.times


def run(side: str, name: str, shape: tuple[int, int], device: torch.device) -> tuple[float, float]:
    """Seconds of a step after the first, and the peak in MB."""
    with PeakMemory() as memory:
        model = new_model(name)
        ids = torch.randint(0, model.config.vocab_size, (STEPS + 1, *shape), device=device)
        if side in ("ours", "checkpointed", "bf16"):
            times = ours(model, ids, checkpointing=side == "checkpointed", bf16=side == "bf16")
        else:
            times = plain(model, ids, has_loss=side == "plain")
    return sum(times[1:]) / STEPS, memory.above / 1e6


def measure(settings: Settings) -> Iterator[Result]:
    shape = (2, 16) if settings.quick else (8, 256)
    for name in ("tiny",) if settings.quick else ("gpt2", "smollm2"):
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, list[float]] = {}
        for _ in range(settings.pairs(2)):
            for side in (*OURS, *GOALS):
                elapsed, peak = settings.in_child(run, side, name, shape, settings.device)
                seconds.setdefault(side, []).append(elapsed)
                peaks.setdefault(side, []).append(peak)
        for side, addition in OURS.items():
            case = f"{name}, {shape[0]} x {shape[1]}{addition}"
            for other, (time_goal, memory_goal) in GOALS.items():
                about: dict[str, Any] = dict(question="whole step", against=f"{other} loop")
                yield Result.of(seconds[side], seconds[other], case=case, goal=time_goal, **about)
                yield Result.of(
                    peaks[side], peaks[other], case=f"{case}, memory", unit="MB", goal=memory_goal, **about
                )  # fmt: skip


if __name__ == "__main__":
    main(measure)
