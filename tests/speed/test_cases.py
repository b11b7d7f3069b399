"""Cases: how they are written, and their prompts."""

import pytest
import torch

from ast_sparse.errors import UserError
from ast_sparse.speed.cases import Case, all_cases, parse_batches, parse_lengths


def test_the_usual_cases_are_the_papers_lengths_at_three_batches() -> None:
    cases = all_cases()
    assert len(cases) == 12 and cases[0] == Case(128, 128, 1) and cases[-1] == Case(1024, 1024, 16)


def test_lengths_and_batches_are_read_as_written_and_measured_once() -> None:
    assert parse_lengths("128/64, 1024/2") == [(128, 64), (1024, 2)]
    assert parse_batches("1, 16") == [1, 16]
    assert all_cases([(8, 8), (8, 8)], [2, 2]) == [Case(8, 8, 2)]


@pytest.mark.parametrize("text", ["", "128", "128/", "128/128/1", "a/b", "128/1", "0/8", "-1/8", "1.5/8", "8/8,"])
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--lengths="):
        parse_lengths(text)


@pytest.mark.parametrize("text", ["", "0", "1,", "one", "-1", "1.5"])
def test_wrong_batches_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--batch="):
        parse_batches(text)


def test_prompts_are_the_same_at_each_call_and_use_the_whole_vocabulary() -> None:
    prompts = Case(64, 2, 8).prompts(7)
    assert prompts.shape == (8, 64) and prompts.dtype == torch.int64
    assert torch.equal(prompts, Case(64, 2, 8).prompts(7))
    assert prompts.unique().tolist() == list(range(7))
