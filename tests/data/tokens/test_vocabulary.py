"""A teacher's tokenizer is compared with the student's."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ast_sparse.data.tokens.vocabulary import check_teacher_tokens, check_text_tokens, difference, renamed_tokens
from ast_sparse.errors import UserError
from tests.models import tiny_tokenizer


def changed(**parts: Any) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with parts of its serialisation changed."""
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    for name, change in parts.items():
        state[name] = change(state[name])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|end|>")


def reordered(model: dict[str, Any]) -> dict[str, Any]:
    ids = list(range(1, len(model["vocab"])))
    random.Random(0).shuffle(ids)
    tokens = list(model["vocab"])
    return {**model, "vocab": dict(zip(tokens, [0, *ids], strict=True))}


def extended(*tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(list(tokens))
    return tokenizer


class Slow:
    """The tiny tokenizer without a Rust backend."""

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self.fast = fast

    def __len__(self) -> int:
        return len(self.fast)

    def __call__(self, text: str, **options: Any) -> Any:
        return self.fast(text, **options)

    def get_vocab(self) -> dict[str, int]:
        return self.fast.get_vocab()

    def decode(self, ids: list[int]) -> str:
        return str(self.fast.decode(ids))


def without_effect() -> dict[str, Any]:
    chat, padded = copy.deepcopy(tiny_tokenizer()), copy.deepcopy(tiny_tokenizer())
    chat.chat_template = "{{ messages }}"
    padded.backend_tokenizer.enable_padding(length=8, pad_token="<|end|>")
    padded.backend_tokenizer.enable_truncation(4)
    with_bos = copy.deepcopy(tiny_tokenizer())
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    pad = copy.deepcopy(tiny_tokenizer())
    pad.pad_token = "<|end|>"
    return {
        "itself": tiny_tokenizer(),
        "chat template": chat,
        "padding and truncation": padded,
        "special tokens around a text": with_bos,
        "a pad token": pad,
        "a slow one": Slow(tiny_tokenizer()),
        "tokens added at the end": extended("<tool>", "<image>"),
    }


@pytest.mark.parametrize("name", without_effect())
def test_equal_tokenizers_are_equal(name: str) -> None:
    other = without_effect()[name]
    assert difference(tiny_tokenizer(), other) is None and difference(other, tiny_tokenizer()) is None


OTHERS = {
    "another order": (lambda: changed(model=reordered), r"token \d+ is '.*' in it and '.*' in the student's"),
    "other merges": (lambda: changed(model=lambda model: {**model, "merges": model["merges"][::-1]}), "it makes"),
    "fewer merges": (lambda: changed(model=lambda model: {**model, "merges": model["merges"][:-5]}), "it makes"),
    "lower case": (
        lambda: changed(normalizer=lambda _: json.loads(normalizers.Lowercase().__getstate__())),
        "it makes .* the student's makes",
    ),
    "a blank before each text": (
        lambda: changed(
            pre_tokenizer=lambda _: json.loads(pre_tokenizers.ByteLevel(add_prefix_space=True).__getstate__())
        ),
        "it makes",
    ),
    "a slow one of another order": (lambda: Slow(changed(model=reordered)), "in it and"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_makes_other_tokens_is_found(name: str) -> None:
    make, message = OTHERS[name]
    with pytest.raises(UserError, match=f"^model.teacher 't' has another tokenizer: .*{message}"):
        check_teacher_tokens(tiny_tokenizer(), make(), 192, 192, "model.teacher 't'")  # type: ignore[no-untyped-call]


def test_padding_of_the_vocabulary_is_no_difference_but_missing_rows_are() -> None:
    tokenizer = tiny_tokenizer()
    for rows, others in ((len(tokenizer), 192), (192, len(tokenizer)), (130, 160), (64, 64)):
        assert check_teacher_tokens(tokenizer, tokenizer, rows, others, "t") is None
    assert check_teacher_tokens(extended("<tool>"), tokenizer, len(tokenizer) + 1, len(tokenizer), "t") is None
    for rows, others in ((128, 64), (64, 128)):
        with pytest.raises(UserError, match=f"t has a vocabulary of {others} tokens, the student {rows}, and its"):
            check_teacher_tokens(tokenizer, tokenizer, rows, others, "t")


def test_without_two_tokenizers_the_sizes_decide() -> None:
    note = check_teacher_tokens(tiny_tokenizer(), None, 128, 128, "t")
    assert note == "t: the teacher has no tokenizer to compare; its tokens are assumed to be the student's"
    assert "the student has no tokenizer" in str(check_teacher_tokens(None, tiny_tokenizer(), 128, 128, "t"))
    with pytest.raises(UserError, match="tokens, the student 128, and the teacher has no tokenizer to compare"):
        check_teacher_tokens(tiny_tokenizer(), None, 128, 192, "t")


def test_another_end_of_text_is_reported() -> None:
    other = copy.deepcopy(tiny_tokenizer())
    other.eos_token = "<|im_end|>"
    note = check_teacher_tokens(tiny_tokenizer(), other, 128, 128, "t")
    assert note == "t ends text with '<|im_end|>', the student with '<|end|>'"


def test_added_tokens_of_other_names_are_allowed_in_no_text() -> None:
    base, chat = extended("<r0>", "<r1>", "<r2>"), extended("<r0>", "<call>", "<end of turn>")
    note = check_teacher_tokens(base, chat, 128, 128, "t")
    assert note == (
        "t has other names for 2 added tokens; the first is 83: '<call>' there and '<r1>' here; text with such tokens "
        "is refused"
    )
    renamed = renamed_tokens(base, chat)
    assert renamed == {83: ("<r1>", "<call>"), 84: ("<r2>", "<end of turn>")}
    check_text_tokens(torch.arange(83), renamed, "t")
    with pytest.raises(UserError, match="The text has the token 84, which is '<r2>' to the student and '<end of turn"):
        check_text_tokens(torch.tensor([[3, 84]]), renamed, "t")


def test_renamed_tokens_in_the_learnt_vocabulary_are_allowed_too() -> None:
    def renaming(name: str) -> PreTrainedTokenizerFast:
        def change(model: dict[str, Any]) -> dict[str, Any]:
            return {**model, "vocab": {name if i == 127 else t: i for t, i in {**model["vocab"], "x": 127}.items()}}

        tokenizer = changed(model=change)
        tokenizer.add_special_tokens({"additional_special_tokens": [name]})
        return tokenizer

    base, chat = renaming("<unused0>"), renaming("<turn>")
    assert base.convert_tokens_to_ids("<unused0>") == chat.convert_tokens_to_ids("<turn>") == 127
    assert difference(base, chat) is None and difference(chat, base) is None
    assert list(renamed_tokens(base, chat)) == [127]


def test_the_end_of_text_is_the_same_whatever_it_is_called() -> None:
    base, chat = extended("<|base|>"), extended("<|chat|>")
    base.eos_token, chat.eos_token = "<|base|>", "<|chat|>"
    assert renamed_tokens(base, chat) == {}
    assert check_teacher_tokens(base, chat, 128, 128, "t") is None


def test_saved_and_loaded_again_it_is_the_same(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    assert difference(tiny_tokenizer(), PreTrainedTokenizerFast.from_pretrained(tmp_path)) is None
