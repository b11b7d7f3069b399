"""User errors and their fields, and helpers for messages: an error in one line, the name that was probably meant."""

import pickle
from typing import Any

import pytest

from ast_sparse.config import CalibrationConfig, DataConfig
from ast_sparse.errors import SharedError, UserError, did_you_mean, one_line


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


def test_an_error_gives_its_fields_other_names_and_nothing_else() -> None:
    text = "too few for calibration.samples=9. Lower calibration.samples or calibration.seq_len, see calibration.data"
    error = UserError(text, "calibration.samples", "calibration.seq_len")
    names = {
        "calibration.samples": "--samples",
        "calibration.seq_len": "--seq-len",
        "calibration.data": "--calibration",
    }
    renamed = error.renamed(names)
    assert str(renamed) == "too few for --samples=9. Lower --samples or --seq-len, see calibration.data"
    assert renamed.fields == ("--samples", "--seq-len")
    assert str(error) == text and str(error.renamed({})) == text


def test_an_error_keeps_its_class_and_fields_from_one_process_to_another() -> None:
    sent = pickle.loads(pickle.dumps(SharedError("data.root=7 is an integer", "data.root")))
    assert type(sent.renamed({"data.root": "--root"})) is SharedError
    assert str(sent) == "data.root=7 is an integer" and sent.fields == ("data.root",)


@pytest.mark.parametrize("values", [{"samples": 0}, {"samples": "many"}, {"damping": float("nan")}, {"seed": 10**50}])
def test_a_wrong_setting_is_a_field_of_its_error(values: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        CalibrationConfig(**values)
    assert caught.value.fields == (f"calibration.{next(iter(values))}",)


def test_a_setting_of_a_domain_is_named_with_the_domain() -> None:
    with pytest.raises(UserError, match=r"data\.domains\.code\.share='much' is text") as caught:
        DataConfig(domains={"code": {"train": "code.jsonl", "share": "much"}})
    assert caught.value.fields == ("data.domains.code.share",)
