"""Documents, and their tokens as one plain list."""

from collections.abc import Sequence

from tests.models import generated_text, tiny_tokenizer

DIGITS = [
    "the",
    "sparse",
    "model",
    "keeps",
    "two",
    "of",
    "four",
    "weights",
    "while",
    "dense",
]  # the words the tokenizer knows


def documents(count: int, sentences: int = 1) -> list[str]:
    """Texts that differ from each other."""
    return [
        f"{generated_text(sentences, seed)} {' '.join(DIGITS[int(digit)] for digit in str(seed))}"
        for seed in range(count)
    ]


def stream(texts: Sequence[str]) -> list[int]:
    """The tokens of the documents in order, an EOS after each: the twin of tokenise_documents."""
    tokenizer = tiny_tokenizer()
    tokens: list[int] = []
    for text in texts:
        if text.strip():
            tokens += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return tokens


def cut(tokens: list[int], block_size: int) -> list[list[int]]:
    return [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
