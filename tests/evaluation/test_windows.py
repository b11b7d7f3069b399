"""Joins, windows and the bytes of tokens, against hand-computed values and slow twins."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ast_sparse.cli.eval import _JOINS
from ast_sparse.errors import UserError
from ast_sparse.evaluation.windows import JOINS, Stream, cut, tokenise
from tests.models import generated_text, tiny_tokenizer

DOCUMENTS = ["two of four", "", "the sparse model keeps é", "late"]


def tokens_of(text: str) -> list[int]:
    return tiny_tokenizer().encode(text, add_special_tokens=False)


def spans(length: int, seq_len: int, stride: int | None = None, keep_rest: bool = False) -> list[tuple[int, int, int]]:
    windows = cut([Stream(list(range(length)), None)], seq_len, stride, keep_rest=keep_rest)
    return [(window.begin, window.end, window.scored) for window in windows]


def test_command_offers_every_join() -> None:
    assert _JOINS == JOINS


@pytest.mark.parametrize(("join", "text"), [("blank-line", "\n\n"), ("newline", "\n"), ("space", " "), ("none", "")])
def test_documents_are_joined_by_text(join: str, text: str) -> None:
    (stream,) = tokenise(tiny_tokenizer(), DOCUMENTS, join)
    assert stream.tokens == tokens_of(text.join(DOCUMENTS))


def test_eos_stands_between_documents_and_for_no_byte() -> None:
    (stream,) = tokenise(tiny_tokenizer(), DOCUMENTS, "eos")
    eos = tiny_tokenizer().eos_token_id
    expected = [tokens_of(document) for document in DOCUMENTS]
    assert stream.tokens == [*expected[0], eos, *expected[1], eos, *expected[2], eos, *expected[3]]
    assert stream.ends is not None and stream.ends[-1] == len("".join(DOCUMENTS).encode())
    at = len(expected[0])
    assert stream.ends[at] == stream.ends[at - 1] == len(DOCUMENTS[0])


def test_separate_documents_are_streams() -> None:
    streams = tokenise(tiny_tokenizer(), DOCUMENTS, "separate")
    assert [stream.tokens for stream in streams] == [tokens_of(document) for document in DOCUMENTS]


def test_eos_needs_the_token() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(UserError, match="--join eos: the tokenizer has no end-of-text token"):
        tokenise(bare, DOCUMENTS, "eos")


def test_windows_without_overlap_drop_the_rest_unless_it_is_kept() -> None:
    assert spans(11, 4) == [(0, 4, 3), (4, 8, 3)]
    assert spans(11, 4, keep_rest=True) == [(0, 4, 3), (4, 8, 3), (8, 11, 2)]
    assert spans(9, 4, keep_rest=True) == [(0, 4, 3), (4, 8, 3)]  # a single token predicts nothing
    assert spans(1, 4, keep_rest=True) == spans(0, 4, 2) == []


def test_overlapping_windows_score_what_is_new() -> None:
    assert spans(11, 6, 2) == [(0, 6, 5), (2, 8, 2), (4, 10, 2), (6, 11, 1)]
    assert spans(8, 6, 2) == [(0, 6, 5), (2, 8, 2)]
    assert spans(3, 6, 5) == [(0, 3, 2)]


@pytest.mark.parametrize("length", [1, 2, 5, 23, 24, 25])
@pytest.mark.parametrize("stride", [1, 3, 5])
def test_a_stride_scores_every_token_but_the_first_once(length: int, stride: int) -> None:
    scored = [token for begin, end, count in spans(length, 6, stride) for token in range(end - count, end)]
    assert scored == list(range(1, length))
    assert all(end - begin <= 6 and count < end - begin for begin, end, count in spans(length, 6, stride))


@pytest.mark.parametrize("stride", [0, 6, 7])
def test_a_stride_is_shorter_than_the_window(stride: int) -> None:
    with pytest.raises(UserError, match=f"--stride {stride} must be between 1 and 5"):
        spans(20, 6, stride)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, so that characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_every_byte_belongs_to_one_token() -> None:
    text = "two  of four\n é→🙂 late \n\n"
    tokenizer = byte_tokenizer()
    (stream,) = tokenise(tokenizer, [text])
    assert len(stream.tokens) == len(text.encode())
    assert stream.ends is not None and stream.ends[-1] == len(text.encode()) and sorted(stream.ends) == stream.ends
    for end in range(1, len(stream.tokens) + 1):  # where tokens make whole characters, their text has these bytes
        decoded = tokenizer.decode(stream.tokens[:end])
        if "\ufffd" not in decoded:
            assert stream.ends[end - 1] == len(decoded.encode())


def test_white_space_that_offsets_leave_out_is_counted() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2's
    (stream,) = tokenise(tokenizer, ["a  b  "])
    assert stream.ends is not None and stream.ends[-1] == 6 and sorted(stream.ends) == stream.ends


def test_bytes_of_windows_are_those_of_their_scored_tokens() -> None:
    text = generated_text(20)
    windows = cut(tokenise(tiny_tokenizer(), [text]), 16)
    expected = [len(tiny_tokenizer().decode(window.tokens[1:]).encode()) for window in windows]
    assert [window.scored_bytes for window in windows] == expected
    covering = cut(tokenise(tiny_tokenizer(), [text]), 16, 4)
    first = len(tiny_tokenizer().decode(tokens_of(text)[:1]).encode())
    assert sum(window.scored_bytes or 0 for window in covering) == len(text.encode()) - first


def test_tokenizer_without_offsets_has_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    (stream,) = tokenise(tiny_tokenizer(), ["two of four weights"])
    assert stream.ends is None and cut([stream], 2)[0].scored_bytes is None
