"""Tokenizers and models that put BOS in front of a text."""

import copy
from pathlib import Path

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.models import save_tiny_model, tiny_tokenizer

EOS, BOS = 0, 82


def bos_tokenizer(single: str | None = "<s> $A", bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a BOS token, put where the template says."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    if bos is not None:
        tokenizer.add_special_tokens({"bos_token": bos})
    if single is not None:
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {"<|end|>", bos or "<|end|>"}]
        template = processors.TemplateProcessing(single, special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def save_bos_model(folder: Path) -> Path:
    save_tiny_model(folder)
    bos_tokenizer().save_pretrained(folder)
    return folder


def plain(text: str) -> list[int]:
    return tiny_tokenizer().encode(text, add_special_tokens=False)


def expected_blocks(texts: list[str], size: int, place: str, bos: int = BOS) -> list[list[int]]:
    begin = [bos] if place == "document" else []
    stream = [token for text in texts if text.strip() for token in [*begin, *plain(text), EOS]]
    front = [bos] if place in ("block", "window") else []
    length = size - len(front)
    return [front + stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]


TEMPLATE = "{% for m in messages %}{{ '<s>' if loop.first }}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = TEMPLATE
    return tokenizer
