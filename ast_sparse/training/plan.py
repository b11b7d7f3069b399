"""What a run will do and need, worked out on the meta device before any weight is loaded (`--dry-run`)."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from ast_sparse.config import RunConfig
from ast_sparse.errors import UserError
from ast_sparse.evaluation.perplexity import max_positions
from ast_sparse.loading import load_model_config
from ast_sparse.sparsity.model import SparsityReport, sparsify_model
from ast_sparse.training.trainer import check_vocabularies

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Layers, tokens and memory of a run.

    Attributes:
        sparsity: which layers are pruned and which are not.
        steps: optimizer steps, or None where the length of the data decides.
        tokens_per_step: over all processes and accumulated batches.
        memory: bytes by item, per device, activations of the blocks not counted.
    """

    sparsity: SparsityReport
    steps: int | None
    tokens_per_step: int
    memory: dict[str, int]

    def lines(self) -> list[str]:
        """The plan as text."""
        lines = self.sparsity.lines()
        per_step = f"{self.tokens_per_step:,} tokens a step"
        if self.steps is None:
            lines.append(f"tokens: {per_step}; training.max_steps is not set, so the data decides the number of steps")
        else:
            lines.append(f"tokens: {self.steps:,} steps x {per_step} = {self.steps * self.tokens_per_step:,}")
        lines.append("memory per device, activations of the blocks not counted:")
        lines += [f"  {item:<40} {size / GIB:8.2f} GiB" for item, size in self.memory.items()]
        lines.append(f"  {'total':<40} {sum(self.memory.values()) / GIB:8.2f} GiB")
        return lines


def make_plan(config: RunConfig, args: TrainingArguments) -> Plan:
    """Build the model on the meta device, select its layers, and count.

    Raises:
        UserError: the model cannot be found, a shape does not fit the pattern or SLoRB, no layer is left, the
            teacher's vocabulary differs, or a block is longer than the model's window.
    """
    model_config = load_model_config(
        config.model.name_or_path,
        revision=config.model.revision,
        gguf_file=config.model.gguf_file,
        trust_remote_code=config.model.trust_remote_code,
        config_overrides=config.model.config_overrides,
    )
    window = max_positions(model_config)
    if window is not None and config.data.block_size > window:
        raise UserError(
            f"data.block_size={config.data.block_size} is longer than the {window} positions of "
            f"{config.model.name_or_path!r}. Set it to {window} or less."
        )
    distills = config.distillation is not None and config.distillation.needs_teacher
    if distills and config.model.teacher is not None:
        check_vocabularies(model_config, load_model_config(config.model.teacher))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
        )
    report = sparsify_model(model, config.sparsity, config.slorb)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sequences = args.per_device_train_batch_size
    half = args.bf16 or args.fp16
    vocab = model_config.get_text_config().vocab_size
    logits = sequences * config.data.block_size * vocab * (2 if half else 4)
    memory = {
        "weights (float32 masters)": 4 * trained,
        "masks": report.pruned_parameters * 9 // 8,
        "gradients": 4 * trained,
        "moments": 8 * trained,
        "logits of student, their gradient": 2 * logits,
    }
    if distills:
        memory["teacher"] = (2 if half else 4) * report.total_parameters
        memory["logits of teacher"] = logits
    per_step = sequences * args.gradient_accumulation_steps * args.world_size * config.data.block_size
    return Plan(report, args.max_steps if args.max_steps > 0 else None, per_step, memory)

