"""Texts that are tokenised in pieces have the tokens of the whole."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from ast_sparse.data.tokens import long_text
from ast_sparse.data.tokens.long_text import Encode, encoded
from ast_sparse.errors import UserError
from tests.models import generated_text

TEXT = generated_text(400, seed=3)


def encoder(tokenizer: Tokenizer) -> Encode:
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    return lambda texts: [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]


def gpt2_like() -> Encode:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return encoder(tokenizer)


def llama_like() -> Encode:
    """A space before every text and no words: the whole text is one piece for the merges, which begin with a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    encode = encoder(tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return encode


@pytest.mark.parametrize("tokenizer", [gpt2_like, llama_like])
def test_pieces_have_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch, tokenizer: Callable[[], Encode]) -> None:
    encode, calls = tokenizer(), []
    texts = ["two of four", TEXT, "", TEXT[:900], "late"]
    expected = [ids for text in texts for ids in encode([text])]
    monkeypatch.setattr(long_text, "CHARACTERS_PER_CALL", 1000)
    monkeypatch.setattr(long_text, "_AROUND", 100)

    def watched(group: list[str]) -> list[list[int]]:
        calls.append(sum(map(len, group)))
        return encode(group)

    assert [ids.tolist() for ids in encoded(watched, texts)] == expected
    assert max(calls) <= 1000 < len(TEXT)


def test_a_text_that_cannot_be_cut_is_taken_whole_up_to_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = gpt2_like()
    monkeypatch.setattr(long_text, "CHARACTERS_PER_CALL", 100)
    monkeypatch.setattr(long_text, "LONGEST_PIECE", 1000)
    (ids,) = encoded(encode, ["ab" * 450])
    assert ids.tolist() == encode(["ab" * 450])[0]
    with pytest.raises(
        UserError, match=r"1,002 characters, 'abab.*, is too long to be tokenised .* Split it, or leave"
    ):
        list(encoded(encode, ["ab" * 501]))


def test_a_cut_that_changes_a_token_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that takes pairs of words as one: a cut changes tokens wherever it is made."""

    def encode(texts: list[str]) -> list[list[int]]:
        return [[len(text.split(" ")), len(text)] for text in texts]

    monkeypatch.setattr(long_text, "CHARACTERS_PER_CALL", 100)
    (ids,) = encoded(encode, [TEXT[:500]])
    assert ids.tolist() == encode([TEXT[:500]])[0]
