"""Tiny models of the families with random weights of every kind: gains, biases, embeddings."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.families import family_model
from tests.models import VOCAB

ROTATABLE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
FAMILIES = (*ROTATABLE, "gemma3_text", "gpt2", "opt")


def random_model(family: str, tied: bool = True, seed: int = 0, **values: object) -> PreTrainedModel:
    """Two blocks, 32 channels, 4 query heads (2 of keys and values), in which no gain is 1 and no bias 0."""
    size = {"word_embed_proj_dim": 32} if family == "opt" else {}
    model = family_model(family, seed, tie_word_embeddings=tied, **size, **values).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:  # channels of unlike strength
                parameter.copy_(0.3 * noise * torch.rand(parameter.shape[1], generator=generator).exp())
    return model


def tokens(sequences: int = 4, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))
