"""Greedy continuations of a few prompts, to read alongside the results."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ast_sparse.data.tokens.bos import find_bos
from ast_sparse.distributed.pieces import is_sharded, reshard
from ast_sparse.errors import UserError
from ast_sparse.evaluation.perplexity import max_positions
from ast_sparse.evaluation.scoring import eval_mode

_NEW_TOKENS = 48


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    field: str = "prompts",
    bos: str = "auto",
) -> dict[str, str]:
    """What a model writes after each prompt, taking the likeliest token each time.

    It stops at the end-of-text token or after 48 tokens; no chat template is applied. If FSDP2 has sharded the model,
    all processes must call this, and each gets all texts.

    Args:
        field: the setting the prompts come from, for messages.
        bos: as in `data.bos`: whether BOS goes before each prompt.

    Raises:
        UserError: a prompt without text, or one that fills the model's positions.
    """
    limit = max_positions(model.config)
    begin = find_bos(bos, tokenizer).tokens
    found: dict[str, str] = {}
    together = is_sharded(model)  # then a process that has finished a text takes part in the passes of the others
    with eval_mode(model), _plain_generation(model):
        for prompt in prompts:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            inputs = torch.tensor([[*begin, *ids]], dtype=torch.long)
            length = inputs.shape[1]
            if not ids:
                raise UserError(f"{field}: {prompt!r} has no tokens. Write another prompt, or remove it.")
            if limit is not None and length >= limit:
                raise UserError(
                    f"{field}: {prompt[:40]!r} … has {length:,} tokens, the model has {limit:,} positions. Shorten it."
                )
            settings = GenerationConfig(
                do_sample=False,
                max_new_tokens=_NEW_TOKENS if limit is None else min(_NEW_TOKENS, limit - length),
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
            inputs = inputs.to(model.device)
            generate: Any = model.generate
            attended = torch.ones_like(inputs)
            tokens = generate(inputs, attention_mask=attended, generation_config=settings, synced_gpus=together)
            found[prompt] = str(tokenizer.decode(tokens[0, length:], skip_special_tokens=True))
    reshard(model)
    return found


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's own settings, such as a repetition penalty, which `generate` adds to those it is given."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
