"""Words for messages: an error on one line, the name that was meant."""

from typing import Any

import pytest

from ast_sparse.errors import did_you_mean, one_line


def test_an_error_of_several_lines_is_one_line() -> None:
    assert one_line(ValueError("  two\n\tof   four ")) == "two of four"


@pytest.mark.parametrize("end", ["kept", "open"])
def test_an_error_that_says_nothing_is_named_by_its_class(end: Any) -> None:
    assert one_line(AssertionError(), end=end) == "AssertionError"


@pytest.mark.parametrize(
    ("cut", "expected"), [("sharp", "one two th"), ("marked", "one two th …"), ("word", "one two …")]
)
def test_a_long_error_is_cut_at_the_limit(cut: Any, expected: str) -> None:
    assert one_line(ValueError("one two three"), 10, cut=cut) == expected
    assert one_line(ValueError("one two th"), 10, cut=cut) == "one two th"


@pytest.mark.parametrize(
    ("end", "text", "expected"),
    [
        ("kept", "No such file.", "No such file."),
        ("open", "No such file...", "No such file"),
        ("open", "...", "ValueError"),
        ("stop", "No such file", "No such file."),
        ("stop", "No such file.", "No such file."),
        ("stop", "No such file!", "No such file!."),
        ("mark", "No such file!", "No such file!"),
        ("mark", "No such file", "No such file."),
    ],
)
def test_the_end_suits_the_sentence_around_the_error(end: Any, text: str, expected: str) -> None:
    assert one_line(ValueError(text), end=end) == expected


def test_a_full_stop_comes_after_what_was_cut_and_not_after_an_ellipsis() -> None:
    assert one_line(ValueError("one two three"), 10, end="stop") == "one two th."
    assert one_line(ValueError("one two three"), 10, cut="word", end="mark") == "one two …"
    assert one_line(ValueError("one two three."), 10, cut="marked", end="open") == "one two th …"


def test_the_class_stands_before_a_single_word_only() -> None:
    assert one_line(KeyError("relux"), named=True) == "KeyError 'relux'"
    assert one_line(ValueError("no relux"), named=True) == "no relux"
    assert one_line(AssertionError(), named=True) == "AssertionError"


def test_the_nearest_name_is_asked_for() -> None:
    assert did_you_mean("bandid", ("constant", "doremi", "bandit")) == "Did you mean 'bandit'?"
    assert did_you_mean("n_heads", {"n_head": 4}, quoted="`{}`".format) == "Did you mean `n_head`?"
    assert did_you_mean("boolk", ["boolq"], quoted=str) == "Did you mean boolq?"


def test_without_a_near_name_nothing_is_asked() -> None:
    assert did_you_mean("bandit", ()) == did_you_mean(None, ("constant", "doremi")) == ""
