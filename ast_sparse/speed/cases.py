"""What is measured: prompts of one length, continued by one number of tokens, so many at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ast_sparse.errors import UserError, shown

LENGTHS = ((128, 128), (128, 1024), (1024, 128), (1024, 1024))  # of the paper: prompt, new tokens
BATCHES = (1, 4, 16)
_SEED = 0
_FEWEST_NEW = 2  # the first new token belongs to the prefill


@dataclass(frozen=True, order=True)
class Case:
    """`batch` prompts of `prompt` tokens, each continued by exactly `new` tokens."""

    prompt: int
    new: int
    batch: int

    def __str__(self) -> str:
        return f"{self.prompt:,}/{self.new:,} batch {self.batch}"

    def prompts(self, vocabulary: int) -> Tensor:
        """Random token ids `[batch, prompt]`, int64; the same ones at each call."""
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randint(0, vocabulary, (self.batch, self.prompt), generator=generator)


def all_cases(lengths: Sequence[tuple[int, int]] = LENGTHS, batches: Sequence[int] = BATCHES) -> list[Case]:
    """Every pair of lengths with every batch, each once."""
    return list(dict.fromkeys(Case(prompt, new, batch) for prompt, new in lengths for batch in batches))


def parse_lengths(text: str) -> list[tuple[int, int]]:
    """`128/128,1024/128` as pairs of prompt and new tokens.

    Raises:
        UserError: it has another form, a prompt is empty, or fewer than two tokens are new.
    """
    pairs = []
    for part in text.split(","):
        numbers = [number.strip() for number in part.split("/")]
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise UserError(f"--lengths={shown(text)} is not of the form PROMPT/NEW,..., such as 128/128,1024/128.")
        prompt, new = map(int, numbers)
        if prompt < 1 or new < _FEWEST_NEW:
            raise UserError(
                f"--lengths={shown(text)}: {part.strip()} needs at least 1 token before {_FEWEST_NEW} new ones."
            )
        pairs.append((prompt, new))
    return pairs


def parse_batches(text: str) -> list[int]:
    """`1,4,16` as numbers.

    Raises:
        UserError: one of them is not a whole number of at least 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--batch={shown(text)} is not a list of whole numbers of at least 1, such as 1,4,16.")
    return [int(part) for part in parts]
