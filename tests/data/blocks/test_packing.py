"""Tokenising, packing and collating, against plain loops."""

import copy
import logging
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from ast_sparse.data.blocks.collator import CausalLMCollator
from ast_sparse.data.blocks.packing import pack_tokens
from ast_sparse.data.pack_dataset import pack_dataset
from ast_sparse.data.tokens.tokenise import token_counts, tokenise_documents, tokenizer_key
from ast_sparse.errors import UserError
from tests.data.documents import cut, documents, stream
from tests.models import generated_text, tiny_tokenizer


# 600 documents are three map batches; a block of 4,000 tokens is longer than the first batch.
@pytest.mark.parametrize(("count", "block_size"), [(5, 16), (600, 97), (600, 4000), (257, 3)])
def test_blocks_equal_a_plain_loop_over_the_documents(count: int, block_size: int) -> None:
    texts = documents(count)
    packed = pack_dataset(Dataset.from_dict({"text": texts}), tiny_tokenizer(), "text", block_size)
    assert packed["input_ids"][:] == cut(stream(texts), block_size)
    assert packed.features["input_ids"].feature.dtype == "int32"


def test_rows_are_plain_lists_of_ints() -> None:
    packed = pack_dataset(Dataset.from_dict({"text": documents(4)}), tiny_tokenizer(), "text", 8)
    assert packed.column_names == ["input_ids"]
    assert type(packed[0]["input_ids"]) is list and type(packed[0]["input_ids"][0]) is int


def test_a_document_much_longer_than_a_block_is_not_truncated() -> None:
    texts = [generated_text(3000), "short."]
    packed = pack_dataset(Dataset.from_dict({"text": texts}), tiny_tokenizer(), "text", 32)
    assert packed["input_ids"][:] == cut(stream(texts), 32)


def test_other_columns_are_dropped_and_any_text_column_serves() -> None:
    data = Dataset.from_dict({"id": [1, 2], "body": documents(2, 4)})
    assert pack_dataset(data, tiny_tokenizer(), "body", 8)["input_ids"][:] == cut(stream(documents(2, 4)), 8)


def test_empty_documents_give_no_token() -> None:
    texts = ["", *documents(3, 3), " \n"]
    tokenised = tokenise_documents(Dataset.from_dict({"text": texts}), tiny_tokenizer(), "text", "x")
    assert [bool(count) for count in token_counts(tokenised)] == [False, True, True, True, False]
    assert list(chain.from_iterable(tokenised["input_ids"])) == stream(texts)


def test_only_the_range_asked_for_is_packed() -> None:
    tokenised = tokenise_documents(Dataset.from_dict({"text": documents(30, 3)}), tiny_tokenizer(), "text", "x")
    rng = np.random.default_rng(0)
    lengths = token_counts(tokenised)
    starts = rng.integers(0, lengths + 1)
    stops = rng.integers(starts, lengths + 1)
    kept = [ids[a:b] for ids, a, b in zip(tokenised["input_ids"], starts, stops, strict=True)]
    assert pack_tokens(tokenised, starts, stops, 11, "x")["input_ids"][:] == cut(list(chain.from_iterable(kept)), 11)


def test_leftover_tokens_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pack_dataset(Dataset.from_dict({"text": documents(5)}), tiny_tokenizer(), "text", 16)
    assert f"the last {len(stream(documents(5))) % 16:,} tokens do not fill a block" in caplog.text


def test_no_warning_about_the_length_of_a_document(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.model_max_length = 8
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        tokenise_documents(Dataset.from_dict({"text": documents(2, 9)}), tokenizer, "text", "x")
    assert "longer than the specified maximum" not in caplog.text


def test_key_of_a_tokenizer_survives_its_use_and_tells_tokenizers_apart() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    key = tokenizer_key(tokenizer)
    tokenizer(["one", "two three"], truncation=True, max_length=3)
    assert tokenizer_key(tokenizer) == key
    tokenizer.add_tokens(["sparse model"])
    assert tokenizer_key(tokenizer) != key


def test_tokenizer_without_eos_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        pack_dataset(Dataset.from_dict({"text": documents(5)}), tokenizer, "text", 16)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"text": ["a b c"]}, r"has \d tokens, fewer than one block of `block_size` = 64"),
        ({"body": ["a b c"]}, "no column `text` .* only body"),
        ({"text": ["a b c", None]}, "row 1: `text` is None, not text"),
        ({"text": [1, 2]}, "row 0: `text` is 1, not text"),
    ],
)
def test_data_set_without_usable_text_is_refused(data: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack_dataset(Dataset.from_dict(data), tiny_tokenizer(), "text", 64)


def test_labels_are_the_inputs_and_eos_stays_a_label() -> None:
    batch = CausalLMCollator(pad_token_id=0)([{"input_ids": [5, 0, 7]}, {"input_ids": torch.tensor([1, 2, 0])}])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [[5, 0, 7], [1, 2, 0]]
    assert batch["labels"].dtype == batch["input_ids"].dtype == torch.int64
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 5


def test_padding_is_on_the_right_and_ignored() -> None:
    batch = CausalLMCollator(pad_token_id=9)([{"input_ids": [5, 6, 7]}, {"input_ids": [1]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 9, 9]]
    assert batch["labels"].tolist() == [[5, 6, 7], [1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_labels_and_masks_of_the_rows_are_kept() -> None:
    rows = [
        {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [0, 1]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ]
    batch = CausalLMCollator(pad_token_id=0)(rows)
    assert batch["labels"].tolist() == [[-100, 6], [-100, 2]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]


def test_batch_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(UserError, match="no pad token"):
        CausalLMCollator()([{"input_ids": [5, 6, 7]}, {"input_ids": [1]}])
    with pytest.raises(UserError, match="2 `input_ids` but 1 `labels`"):
        CausalLMCollator(0)([{"input_ids": [5, 6], "labels": [6]}])


def test_padding_marked_by_an_attention_mask_is_no_label() -> None:
    row = {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}
    batch = CausalLMCollator(pad_token_id=0)([row, {"input_ids": [7, 8, 9, 1], "attention_mask": [1, 1, 1, 1]}])
    assert batch["labels"].tolist() == [[5, 6, -100, -100], [7, 8, 9, 1]]
