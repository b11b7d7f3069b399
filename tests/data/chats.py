"""Conversations and tokenizers with chat templates."""

import copy
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from ast_sparse.data.tokens.chat import tokenise_conversations
from tests.models import tiny_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<' + message['role'] + '>\n' }}"
    "BEGIN{{ message['content'] + '<|end|>' }}END{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)


PLAIN = CHATML.replace("BEGIN", "").replace("END", "")
MARKED = CHATML.replace("BEGIN", "{% if message['role'] == 'assistant' %}{% generation %}").replace(
    "END",
    "{% endgeneration %}{% else %}{{ message['content'] + '<|end|>' }}{% endif %}",
)


def tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    made = copy.deepcopy(tiny_tokenizer())
    made.chat_template = template
    return made


def conversation(*turns: str) -> list[dict[str, str]]:
    """Turns of user and assistant in alternation; one that begins with ! is the system's."""
    roles = ["user", "assistant"] * len(turns)
    system = [{"role": "system", "content": turn[1:]} for turn in turns if turn.startswith("!")]
    spoken = [turn for turn in turns if not turn.startswith("!")]
    return system + [{"role": role, "content": turn} for role, turn in zip(roles, spoken, strict=False)]


ROWS = [
    conversation("two of four", "keeps the dense masks"),
    conversation("!late", "which weights", "two", "and then", "four masks move"),
    conversation("the sparse model", "moves"),
]


def counted(row: dict[str, Any]) -> list[str]:
    """The stretches of a row that are counted, as text."""
    stretches: list[list[int]] = []
    for index, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
        assert label in (token, -100)
        if label == token:
            if not index or row["labels"][index - 1] == -100:
                stretches.append([])
            stretches[-1].append(token)
    return [tiny_tokenizer().decode(stretch) for stretch in stretches]


def made(rows: Dataset, template: str | None = PLAIN) -> list[dict[str, Any]]:
    return list(tokenise_conversations(rows, tokenizer(template), "chat"))
