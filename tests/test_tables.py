"""The text table of the commands."""

import pytest

from ast_sparse.tables import format_table


def test_numbers_stand_right_and_words_left() -> None:
    table = format_table(
        ("model", "windows", "ppl"), [("a", 1234, 26.982), ("longer name", 6, 1234.5), ("c", None, "-")]
    )
    assert table.splitlines() == [
        "model        windows       ppl",
        "-----------  -------  --------",
        "a              1,234     26.98",
        "longer name        6  1,234.50",
        "c                  -         -",
    ]


def test_formatted_numbers_stand_right_too() -> None:
    assert format_table(("a", "b"), [("9.5%", True), ("12.5%", False)]).splitlines()[2:] == [" 9.5%  yes", "12.5%  no"]


def test_table_without_rows_is_its_header() -> None:
    assert format_table(("model", "ppl"), []) == "model  ppl\n-----  ---"


def test_row_of_the_wrong_length_is_an_error() -> None:
    with pytest.raises(ValueError):
        format_table(("a", "b"), [(1,)])
